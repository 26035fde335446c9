"""Progress on a terminal as a bar, elsewhere as a line now and then."""

from __future__ import annotations

import logging
import sys
import time

import jax
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_log = logging.getLogger("fne_jax.progress")


class TrainingProgress:
    """Shows step, loss, pairs/s, time left and the share of time spent waiting for data."""

    def __init__(self, first_step: int, total_steps: int, batch_size: int, every_seconds: float):
        self._first, self._total, self._batch = first_step, total_steps, batch_size
        self._every = every_seconds
        self._started = self._last_line = time.monotonic()
        self._bar = self._task = None
        if sys.stderr.isatty() and jax.process_index() == 0:
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._task = self._bar.add_task("train", total=total_steps, note="")
            self._bar.start()

    def update(self, step: int, loss: float | None, waiting_share: float) -> None:
        """Shows that `step` updates were applied; a loss of None is one not fetched yet."""
        now = time.monotonic()
        rate = self._batch * (step - self._first) / max(now - self._started, 1e-9)
        shown = "" if loss is None else f"loss {loss:.4f}  "
        note = f"{shown}{rate:.0f} pairs/s  waiting for data {waiting_share:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif now - self._last_line >= self._every or step == self._total:
            self._last_line = now
            left = (self._total - step) * self._batch / max(rate, 1e-9)
            _log.info("step %d/%d  %s  %.0f s left", step, self._total, note, left)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

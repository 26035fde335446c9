"""Progress of a long task: a bar on a terminal, elsewhere occasional log lines."""

from __future__ import annotations

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as _Bar

_log = logging.getLogger("fne_jax.progress")


class Progress:
    """A context manager that shows how many of `total` items are done.

    On a terminal it draws a bar to stderr. Elsewhere it logs the count, the rate and the time
    left: at most one line each `every_seconds`, and one when the last item is done.

    Args:
      task: The name of the task, e.g. "train".
      total: The number of items.
      completed: The number of items that were done before this process began.
      every_seconds: The least time between two lines in the log.
      enabled: Whether anything is shown; usually only the first of several processes shows it.
    """

    def __init__(
        self,
        task: str,
        total: int,
        *,
        completed: int = 0,
        every_seconds: float = 20.0,
        enabled: bool = True,
    ):
        self._task, self._total = task, total
        self._first = self._completed = completed
        self._every_seconds = every_seconds
        self._started = self._last_line = time.monotonic()
        terminal = sys.stderr.isatty()
        self._logs = enabled and not terminal
        self._bar = _Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not (enabled and terminal),
        )
        self._row = self._bar.add_task(task, total=total, completed=completed, note="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def update(self, completed: int, note: str = "") -> None:
        """Shows that `completed` items are done, those done before included, and a short note."""
        self._completed = completed
        self._bar.update(self._row, completed=completed, note=note)
        now = time.monotonic()
        due = now - self._last_line >= self._every_seconds or completed >= self._total
        if self._logs and due:
            self._last_line = now
            self._log_line(now - self._started, note)

    def advance(self, count: int = 1) -> None:
        """Shows that `count` more items are done."""
        self.update(self._completed + count)

    def _log_line(self, seconds, note):
        parts = [f"{self._task}: {self._completed}/{self._total}"]
        done = self._completed - self._first
        if done > 0:
            rate = done / max(seconds, 1e-9)
            left = (self._total - self._completed) / rate
            parts += [f"{rate:.3g}/s", f"{left:.0f} s left"]
        if note:
            parts.append(note)
        _log.info("  ".join(parts))

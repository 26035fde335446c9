"""How far the preparation of a dataset is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 20
_log = logging.getLogger("fne_jax.prepare")


class PreparationProgress:
    """A context that shows how many of `total` images are done.

    Args:
      task: what is being done.
      total: images.
    """

    def __init__(self, task: str, total: int):
        self._task_name, self._total, self._done = task, total, 0
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(task, total=total)

    def __enter__(self) -> PreparationProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        """Counts images as done."""
        self._done += images
        self._bar.advance(self._task, images)
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            _log.info("%s: %d of %d", self._task_name, self._done, self._total)

"""Logging of the commands and of the processes that they start."""

from __future__ import annotations

import functools
import logging
import sys


class _StderrHandler(logging.StreamHandler):
    """Writes plain messages to what is stderr by then: a progress bar puts lines above itself."""

    def __init__(self):
        logging.Handler.__init__(self)  # StreamHandler's own would keep today's stderr
        self.setFormatter(logging.Formatter("%(message)s"))

    @property
    def stream(self):
        return sys.stderr


def set_up_logging(level: int) -> None:
    """Logs this package's messages to stderr from a level up, and quiets its dependencies.

    It has the last word: libraries that log while they are imported (Orbax does, through absl) give
    the root logger a handler of their own. Handlers that write elsewhere stay.
    """
    for handler in logging.root.handlers[:]:
        if type(handler) in (logging.StreamHandler, _StderrHandler):
            logging.root.removeHandler(handler)
    logging.root.addHandler(_StderrHandler())
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("fne_jax").setLevel(level)
    # As a save fails, Orbax and asyncio log the error of each thread and task with a traceback, and
    # the first of them is raised and told in one line.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _tell_unraisable


@functools.cache
def warn_once(log: logging.Logger, line: str) -> None:
    """Logs a line as a warning unless this process has done so, or it is empty."""
    if line:
        log.warning("%s", line)


def _tell_unraisable(unraisable):
    """Prints unraisable errors, except those of TensorStore's threads after a failed save.

    They tell of each write to an event loop that Orbax closed after the first error.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)

"""An error in one process ends all processes of the run, within seconds and with its exit code.

JAX alone would let the others wait for it, for as long as a heartbeat may be late, and abort them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from typing import NoReturn

import jax
from jax._src import distributed  # for its store, which Orbax uses too; it has no public name

# In the store of JAX's coordinator: by process, exit code (0 for a good end) and last words.
_FOLDER = "fne_jax/ended/"
_POLL_SECONDS = 1.0
# Process 0 holds the store, and leaves last, but does not wait for the dead.
_LINGER_SECONDS = 10.0
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it
_leaving = threading.Lock()


def watch() -> None:
    """Ends this process as soon as another one of the run has told of its end by an error."""
    if jax.process_count() == 1:
        return
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(over,), name="common end", daemon=True)
    thread.start()

    def end_well():
        over.set()
        thread.join()
        _wait_for_all()

    atexit.register(end_well)  # runs before JAX leaves its coordinator


def end_together(code: int, message: str, *, echo: bool) -> None:
    """Tells the other processes that this one ends by an error, and exits; returns if it is alone.

    Args:
      code: The exit code.
      message: What is printed to stderr, here and by the others.
      echo: Whether the error may come of another process's end, as a closed connection does: that
        one's exit code and message are then taken, if it has told them.
    """
    if distributed.global_state.client is None or jax.process_count() == 1:
        return
    if echo:
        with contextlib.suppress(RuntimeError):  # the coordinator is gone
            _leave_after_errors(_told())
    _leave(code, message)


def _watch(over):
    while not over.wait(_POLL_SECONDS):
        try:
            _leave_after_errors(_told())
        except RuntimeError:  # the coordinator is gone, upon which JAX ends this process
            return


def _wait_for_all():
    """Waits at a good end for those of the others, of which one may still meet an error."""
    try:
        _tell(0, "")
        while len(told := _told()) < jax.process_count():
            _leave_after_errors(told)
            time.sleep(_POLL_SECONDS / 10)
        _leave_after_errors(told)
    except RuntimeError:
        pass


def _tell(code, message):
    key = f"{_FOLDER}{jax.process_index()}"
    distributed.global_state.client.key_value_set(key, f"{code} {message}", allow_overwrite=True)


def _told():
    """Returns the exit codes and the last words of the processes that have ended, by number."""
    entries = distributed.global_state.client.key_value_dir_get(_FOLDER)
    parts = ((key.rpartition("/")[2], *value.partition(" ")) for key, value in entries)
    return {int(process): (int(code), message) for process, code, _, message in parts}


def _leave_after_errors(told):
    for process, (code, message) in sorted(told.items()):
        if code:
            echo = message.startswith("process ")
            _leave(code, message if echo else f"process {process}: {message}")


def _leave(code, message) -> NoReturn:
    with _leaving:  # for good: the other thread of this process waits here
        shown = _SHOW_CURSOR + message if sys.stderr.isatty() else message
        print(shown, file=sys.stderr, flush=True)
        sys.stdout.flush()
        try:
            _tell(code, message)
            last = time.monotonic() + _LINGER_SECONDS
            while jax.process_index() == 0 and len(_told()) < jax.process_count():
                if time.monotonic() > last:
                    break
                time.sleep(_POLL_SECONDS / 10)
        except RuntimeError:
            pass
        # Not sys.exit: JAX would wait for the others at the interpreter's end.
        os._exit(code)

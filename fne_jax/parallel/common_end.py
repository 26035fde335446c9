"""An error in one process ends all processes of the run, within seconds and with its exit code.

JAX alone would let the others wait for it, for as long as a heartbeat may be late, and abort them.
The first error that is no echo of another process's end is the cause: all print it, after an own
error if they have one, and take its exit code.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import threading
import time
from typing import NamedTuple, NoReturn

import jax
from jax._src import distributed  # for its store, which Orbax uses too; it has no public name

from fne_jax.errors import UserError

# In the store of JAX's coordinator: the first error, and the numbers of processes that have ended.
_FOLDER = "fne_jax/ended/"
_CAUSE = "cause"
_POLL_SECONDS = 1.0
# How long an echo waits for the words of its cause, which may still be closing its files.
_ECHO_SECONDS = 5.0
# Process 0 holds the store, and leaves last, but does not wait for the dead.
_LINGER_SECONDS = 10.0
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it
# How XLA's messages begin where it could not go on; what it refuses is INVALID_ARGUMENT.
_STATUS = re.compile(
    "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "
)
_leaving = threading.Lock()


class FailedElsewhereError(UserError):
    """Another process failed, and this one heard of it, but not of what it was."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self._exit_code = exit_code

    @property
    def exit_code(self) -> int:
        """That of the process that failed."""
        return self._exit_code


class _Cause(NamedTuple):
    process: int
    code: int
    message: str


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


def end_together(code: int, message: str, error: BaseException) -> None:
    """Tells the other processes that this one ends by an error, and exits; returns if it is alone.

    An echo prints the cause's words instead of its own, if they come in time. What is no echo is
    always printed, also if another process's error came first and all exit with that one's code:
    the message goes to stderr, here and, if it is about the first error, by the others.
    """
    if distributed.global_state.client is None or jax.process_count() == 1:
        return
    if is_echo(error):
        with contextlib.suppress(RuntimeError):  # the coordinator is gone
            _leave_after(_await_cause())
    _leave(code, message)


def is_echo(error: BaseException) -> bool:
    """Returns whether an error may come of another process's end rather than of this process.

    A collective, a transfer between processes and the coordinator raise JaxRuntimeError or, out of
    the call that runs a program, ValueError when a process is gone; libraries may wrap them.
    """
    seen = error
    while seen is not None:
        if isinstance(seen, FailedElsewhereError | jax.errors.JaxRuntimeError | ConnectionError):
            return True
        if isinstance(seen, ValueError) and _STATUS.match(str(seen)):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


def _watch(over):
    while not over.wait(_POLL_SECONDS):
        try:
            _leave_after(_told()[0])
        except RuntimeError:  # the coordinator is gone, upon which JAX ends this process
            return


def _wait_for_all():
    """Waits at a good end for those of the others, of which one may still meet an error."""
    try:
        _tell_end()
        ended = 0
        while ended < jax.process_count():
            cause, ended = _told()
            _leave_after(cause)
            time.sleep(_POLL_SECONDS / 10)
    except RuntimeError:
        pass


def _await_cause():
    last = time.monotonic() + _ECHO_SECONDS
    while (cause := _told()[0]) is None and time.monotonic() < last:
        time.sleep(_POLL_SECONDS / 10)
    return cause


def _tell_end():
    key = f"{_FOLDER}{jax.process_index()}"
    distributed.global_state.client.key_value_set(key, "", allow_overwrite=True)


def _tell_error(code, message):
    """Makes an error the cause of the run's end, unless there is one; returns the cause."""
    value = f"{jax.process_index()} {code} {message}"
    try:
        distributed.global_state.client.key_value_set(_FOLDER + _CAUSE, value)
    except RuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
    return _told()[0]


def _told():
    """Returns the cause, or None, and how many processes have ended."""
    entries = distributed.global_state.client.key_value_dir_get(_FOLDER)
    values = {key.rpartition("/")[2]: value for key, value in entries}
    cause = values.pop(_CAUSE, None)
    if cause is not None:
        process, code, message = cause.split(" ", 2)
        cause = _Cause(int(process), int(code), message)
    return cause, len(values)


def _leave_after(cause):
    if cause is not None:
        _leave(cause.code, cause=cause)


def _leave(code, message=None, *, cause=None) -> NoReturn:
    """Exits after an own error, which is printed and told to the others, or after a cause."""
    with _leaving:  # for good: the other thread of this process waits here
        try:
            print(_SHOW_CURSOR if sys.stderr.isatty() else "", end="", file=sys.stderr)
            if cause is None:
                print(message, file=sys.stderr, flush=True)
                cause = _tell_error(code, message)
                code = cause.code
            if cause.process != jax.process_index() and cause.message != message:
                print(f"process {cause.process}: {cause.message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            _tell_end()
            last = time.monotonic() + _LINGER_SECONDS
            while jax.process_index() == 0 and _told()[1] < jax.process_count():
                if time.monotonic() > last:
                    break
                time.sleep(_POLL_SECONDS / 10)
        except RuntimeError:  # the coordinator is gone
            pass
        finally:  # also where nobody reads what is printed
            # Not sys.exit: JAX would wait for the others at the interpreter's end.
            os._exit(code)

"""Errors that end a command with one line instead of a traceback, and their exit codes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_ENVIRONMENT_FAILURE = 74  # EX_IOERR of BSD's sysexits.h

# Errors of the file system that the user alone can mend: a path that is mistaken or not permitted.
_MISTAKEN_PATH = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def is_environment_failure(error: BaseException | None) -> bool:
    """Returns whether the machine failed: a full disk, a lost file system, no memory.

    Libraries raise OSError for damaged content too; the operating system's own have a number.
    """
    if isinstance(error, MemoryError):
        return True
    numbered = isinstance(error, OSError) and error.errno is not None
    return numbered and not isinstance(error, _MISTAKEN_PATH)


def first_line(error: BaseException) -> str:
    r"""Returns the first line of an error's message that says anything.

    Libraries raise messages of a page, of blank lines, and none at all.

    >>> first_line(ValueError("\nno such file\nin /runs"))
    'no such file'
    >>> first_line(EOFError())
    'EOFError'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """An error that the user can fix: what was wrong, what was expected, what to do."""

    @property
    def exit_code(self) -> int:
        """2, or 74 if the machine failed, where a restart may help."""
        if is_environment_failure(self.__cause__):
            return EXIT_ENVIRONMENT_FAILURE
        return EXIT_USER_ERROR


class EnvironmentFailure(UserError):
    """The machine failed rather than the input: the same command may succeed later."""

    @property
    def exit_code(self) -> int:
        """74."""
        return EXIT_ENVIRONMENT_FAILURE


def install_command(extra: str) -> str:
    """Returns what installs an extra of setup.py."""
    return f"pip install -e '.[{extra}]'"


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Raises UserError, which names the extra, if an import in the block fails.

    `what` is what the import is for, as the message begins.
    """
    try:
        yield
    except ImportError as error:
        missing = error.name or first_line(error)
        raise UserError(f"{what} needs {missing}: {install_command(extra)}") from error


class Interrupted(Exception):
    """A signal stopped the run, which saved its state first.

    Attributes:
      exit_code: 128 plus the signal's number, as shells report it (129 a closed terminal, 130
        Ctrl-C, 143 SIGTERM).
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(signal_number, message)
        self.exit_code = 128 + signal_number

    def __str__(self):
        return self.args[1]

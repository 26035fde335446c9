"""What the commands share: a parser, logging, and errors as one line."""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable

from fne_jax import files
from fne_jax.encoders.hub_files import run_folder
from fne_jax.errors import (
    EXIT_BUG,
    EXIT_ENVIRONMENT_FAILURE,
    EXIT_USER_ERROR,
    Interrupted,
    UserError,
    is_environment_failure,
)
from fne_jax.logs import set_up_logging
from fne_jax.parallel import common_end

# TensorFlow and transformers print as a command imports them; a user's own settings stand.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# Options that name runs to be read.
_RUNS = ("workdir", "for_evaluation")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parser(description: str, command: str) -> argparse.ArgumentParser:
    """Returns a parser that reports bad arguments as a UserError."""
    return _Parser(prog=f"python -m fne_jax.{command}", description=description, allow_abbrev=False)


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of a command line and its `--config.x=y`; UserError for anything else."""
    options, overrides = parser.parse_known_args(arguments)
    for override in overrides:
        if not override.startswith(("--config.", "--noconfig.")):
            raise UserError(f"unknown argument {override!r}; see --help")
    return options, overrides


def expand_home(options: argparse.Namespace, *names: str) -> None:
    """Replaces `~` in the options that are paths: shells leave it where it follows a `=`.

    Those that are runs may be on the Hugging Face hub, as `run_folder` takes them.

    Args:
      options: The parsed command line.
      *names: The options, each a path, a list of paths, or None.

    Raises:
      UserError: If one is empty, there is no user of the name that follows a `~`, or the hub does
        not give the run.
    """
    for name in names:
        given, local = getattr(options, name), run_folder if name in _RUNS else files.expand_home
        if given == "":  # as a shell variable that was never set
            raise UserError(f"--{name.strip('_').replace('_', '-')}= is empty; expected a path")
        if isinstance(given, list):
            setattr(options, name, [str(local(path)) for path in given])
        elif given is not None:
            setattr(options, name, str(local(given)))


def run(main: Callable[[list[str]], None]) -> None:
    """Calls a command's main function and exits with a code of the table in docs/runs.md.

    Output to a closed stdout is dropped; when the output pipe closes, as by `head`, the command
    ends silently.

    Args:
      main: Takes the command line, without the program's name.
    """
    _open_closed_streams()
    set_up_logging(logging.INFO)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        return
    except Interrupted as stop:  # all processes of a run have stopped at the same place
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except (UserError, PermissionError) as error:
        code = getattr(error, "exit_code", EXIT_USER_ERROR)
        message, raised = f"error: {error}", error
    except KeyboardInterrupt as error:
        code, message, raised = 128 + signal.SIGINT, "stopped; there was nothing to save", error
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _drop_unread_output():
            code, message = 128 + signal.SIGPIPE, "stopped: nobody reads the output any more"
            common_end.end_together(code, message, error)
            sys.exit(code)
        if not is_environment_failure(error):
            common_end.end_together(EXIT_BUG, traceback.format_exc().rstrip(), error)
            raise
        message = f"error: {type(error).__name__}: {error}".rstrip(": ")
        code, raised = EXIT_ENVIRONMENT_FAILURE, error
    common_end.end_together(code, message, raised)
    print(message, file=sys.stderr)
    sys.exit(code)


def _open_closed_streams():
    """Lets streams that the shell closed (`>&-`) discard what is written."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)


def _drop_unread_output():
    """Returns whether the output pipe is closed; if so, drops what was not read.

    A pipe to another process may break, too, which is an error.
    """
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # what stands for it in tests and notebooks is not a file
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # Python writes what is left as it ends, and would complain.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stdout)
    os.close(nowhere)
    return True

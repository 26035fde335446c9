"""What the commands share: a parser, logging, and errors as one line."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable

from fne_jax.errors import Interrupted, UserError
from fne_jax.logs import set_up_logging

EXIT_USER_ERROR = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parser(description: str, command: str) -> argparse.ArgumentParser:
    """Returns a parser that reports bad arguments as a UserError."""
    return _Parser(prog=f"python -m fne_jax.{command}", description=description, allow_abbrev=False)


def run(main: Callable[[list[str]], None]) -> None:
    """Calls a command's main function and exits: 0, 2 for a user's error, 128 + signal."""
    set_up_logging(logging.INFO)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("stopped; there was nothing to save", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)

"""Errors that end a command in one line instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input: the message names what was wrong, what was expected and what to do."""


class Interrupted(Exception):
    """A signal asked the run to stop, and it did so in good order.

    Attributes:
      exit_code: 128 plus the signal's number, as shells report it (130 Ctrl-C, 143 SIGTERM).
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(signal_number, message)
        self.exit_code = 128 + signal_number

    def __str__(self):
        return self.args[1]

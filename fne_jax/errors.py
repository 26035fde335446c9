"""Errors that a user can mend, told in one line instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input: the message names what was wrong, what was expected and what to do."""

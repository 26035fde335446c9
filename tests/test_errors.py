"""What an error says fits into a message of one line."""

import doctest

import pytest

from fne_jax import errors


def test_examples_run():
    assert doctest.testmod(errors) == (0, 2)


@pytest.mark.parametrize(
    ("message", "line"),
    [("no\r\nyes", "no"), ("  \n\t\n so \n.", "so "), ("\n \n", "EOFError"), ("", "EOFError")],
)
def test_the_first_line_that_says_something(message, line):
    assert errors.first_line(EOFError(message)) == line

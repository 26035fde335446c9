"""Progress as a bar on a terminal, and as a few lines in a log elsewhere."""

import io
import logging
import types

import pytest

from fne_jax import progress
from fne_jax.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set, and stderr that is no terminal."""
    now = types.SimpleNamespace(seconds=0.0)
    fake = types.SimpleNamespace(monotonic=lambda: now.seconds)
    monkeypatch.setattr(progress, "time", fake)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    return now


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_lines_come_now_and_then_and_at_the_end(clock, caplog):
    with (
        caplog.at_level(logging.INFO, "fne_jax"),
        Progress("train", 100, completed=10, every_seconds=20) as shown,
    ):
        for step in range(11, 61):
            clock.seconds += 1
            shown.update(step, "loss 0.1234")
        shown.advance(39)
        clock.seconds += 5
        shown.advance()
    assert messages(caplog) == [
        "train: 30/100  1/s  70 s left  loss 0.1234",
        "train: 50/100  1/s  50 s left  loss 0.1234",
        "train: 100/100  1.64/s  0 s left",
    ]


def test_a_line_before_anything_is_done_names_no_rate(clock, caplog):
    with caplog.at_level(logging.INFO, "fne_jax"), Progress("checking", 5) as shown:
        clock.seconds = 30
        shown.update(0)
    assert messages(caplog) == ["checking: 0/5"]


def test_a_terminal_gets_a_bar_and_the_log_nothing(monkeypatch, caplog):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level(logging.INFO, "fne_jax"), Progress("train", 3) as shown:
        shown.update(2, "loss 0.5")
        shown.advance()
    assert "train" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert not messages(caplog)


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_nothing_is_shown_where_it_is_not_enabled(monkeypatch, caplog, stream):
    stream = stream()
    monkeypatch.setattr("sys.stderr", stream)
    with caplog.at_level(logging.INFO, "fne_jax"), Progress("train", 1, enabled=False) as shown:
        shown.advance()
    assert not stream.getvalue() and not messages(caplog)

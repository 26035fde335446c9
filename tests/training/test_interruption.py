"""Signals that ask a run to stop: which are heard, and what a second one does."""

import os
import signal

import pytest

from fne_jax.training.interruption import StopRequest, stop_signals


@pytest.mark.parametrize("number", stop_signals())
def test_a_signal_asks_to_stop_and_a_second_one_ends_the_process(number):
    heard = stop_signals()
    before = [signal.getsignal(other) for other in heard]
    with StopRequest() as stop:
        assert stop.poll() is None
        os.kill(os.getpid(), number)
        assert stop.poll() == number
        assert all(signal.getsignal(other) is signal.SIG_DFL for other in heard)
    assert [signal.getsignal(other) for other in heard] == before


def test_a_signal_that_nohup_hides_stays_hidden():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.poll() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.poll() == signal.SIGTERM
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)

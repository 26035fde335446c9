"""Stopping in good order on Ctrl-C, SIGTERM and SIGHUP, all processes at the same place."""

from __future__ import annotations

import collections
import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# Polls between a vote of all processes and its count: the votes of as many steps may be in flight.
_LAG = 2


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that ask to stop: Ctrl-C, SIGTERM, and SIGHUP of a closed terminal.

    Those that the process was told to ignore, as `nohup` does with SIGHUP, are left out.
    """
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in asked if signal.getsignal(number) is not signal.SIG_IGN]


class Stopped(Exception):
    """Work was abandoned because a signal asked the run to stop."""


class StopRequest:
    """Remembers a signal while it is a context; a second one takes its usual effect at once.

    `signal_number` is the one that came to this process, or None.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._previous = {}
        self._votes = collections.deque()
        self._agreed = 0
        self._latest = _latest_signal() if jax.process_count() > 1 else None

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in stop_signals()}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def poll(self) -> int | None:
        """Returns the signal to stop by, or None to go on: the same on all processes.

        Several processes must call this equally often and in the same places, between programs
        that they run together. A signal that reached any of them is then returned by all at the
        same call, the third after it at the latest; nothing waits for a program just begun.
        """
        if self._latest is None:
            return self.signal_number
        if not self._agreed:
            self._votes.append(self._latest(self.signal_number or 0))
            if len(self._votes) > _LAG:
                self._agreed = int(self._votes.popleft())
        return self._agreed or None

    def check(self) -> None:
        """Polls, and raises Stopped if there is a signal to stop by."""
        if self.poll() is not None:
            raise Stopped

    def _note(self, number, frame):
        del frame
        self.signal_number = number
        for other in self._previous:
            signal.signal(other, signal.SIG_DFL)


def _latest_signal():
    """Returns a function that begins the maximum of a number over all processes."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("device",))
    by_device = NamedSharding(mesh, PartitionSpec("device"))
    maximum = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def begin(number):
        local = np.full(jax.local_device_count(), number, np.int32)
        return maximum(jax.make_array_from_process_local_data(by_device, local))

    return begin

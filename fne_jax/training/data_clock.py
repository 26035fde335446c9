"""How long a training loop waits for its data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any


class DataClock:
    """Iterates over batches and measures how long the loop waits for them."""

    def __init__(self, batches: Iterator[Any]):
        self._batches = iter(batches)
        self._started = self._window_started = time.monotonic()
        self._waited = self._window_waited = 0.0
        self._batch_count = self._window_batches = 0

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches."""
        while True:
            before = time.monotonic()
            try:
                batch = next(self._batches)
            except StopIteration:
                return
            waited = time.monotonic() - before
            self._waited += waited
            self._window_waited += waited
            self._batch_count += 1
            self._window_batches += 1
            yield batch

    @property
    def batches_per_second(self) -> float:
        """Batches a second since the start."""
        return self._batch_count / max(time.monotonic() - self._started, 1e-9)

    @property
    def waiting_share(self) -> float:
        """Share of the time since the start spent waiting."""
        return self._waited / max(time.monotonic() - self._started, 1e-9)

    def paused(self):
        """Returns a context whose time does not count."""
        return _Pause(self)

    def take_rates(self, batch_size: int) -> dict[str, float]:
        """Returns pairs a second and the waiting share since the last call."""
        elapsed = max(time.monotonic() - self._window_started, 1e-9)
        rates = {
            "pairs_per_s": self._window_batches * batch_size / elapsed,
            "data_wait_share": self._window_waited / elapsed,
        }
        self._window_started = time.monotonic()
        self._window_waited, self._window_batches = 0.0, 0
        return rates

    def shift(self, seconds: float) -> None:
        """Leaves a span of time out of all rates."""
        self._started += seconds
        self._window_started += seconds


class _Pause:
    def __init__(self, clock: DataClock):
        self._clock = clock

    def __enter__(self):
        self._before = time.monotonic()

    def __exit__(self, *exception):
        self._clock.shift(time.monotonic() - self._before)

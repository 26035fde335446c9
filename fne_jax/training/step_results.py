"""What steps leave: scalars, word of bad batches, which negatives were false, and their times."""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from fne_jax.data.batches import BatchOrder
from fne_jax.data.pairs import PairDataset
from fne_jax.data.sources.shapes_scenes import SceneTruth

# Steps that may still be running: enough to keep the device busy and memory bounded.
_IN_FLIGHT = 2
# Counts that run on from step to step and start again with each epoch: their mean over a window is
# nothing that ever was, so the last one is logged.
_RUNNING_COUNTS = ("positive_count", "negative_count")
_log = logging.getLogger(__name__)


class StepResults:
    """The results of the steps since the last write; stored with a checkpoint.

    A step's results are fetched some steps later, so that the device does not wait for the host.
    The order names the pairs of a bad batch, and the training split tells the truth about its pairs
    where that is known. `stored` is what that method returned before the run was stopped, or None.

    Attributes:
      bad_steps: How many steps were not applied since the start of the run, because their loss or
        gradient was not finite.
      bad_in_a_row: How many of them came since the last step that was applied.
      last_loss: The loss of the last settled step that was applied; None before there is one.
    """

    def __init__(
        self, order: BatchOrder, train: PairDataset, stored: Mapping[str, Any] | None = None
    ):
        self._order, self._train = order, train
        self._pending = collections.deque()
        stored = stored or {}
        window = stored.get("window", {"sums": {}, "counts": {}})
        self._sums: dict[str, float] = dict(window["sums"])
        self._counts: dict[str, int] = dict(window["counts"])
        self.last_loss: float | None = None
        bad = stored.get("bad_steps", {"total": 0, "in_a_row": 0})
        self.bad_steps, self.bad_in_a_row = bad["total"], bad["in_a_row"]

    def add(
        self, step: int, scalars: Mapping[str, jax.Array], negatives: Mapping[str, jax.Array]
    ) -> None:
        """Adds what a train step returned; it may still be running."""
        self._pending.append((step, scalars, negatives))
        # After a bad step the next ones are looked at as they come.
        while len(self._pending) > (0 if self.bad_in_a_row else _IN_FLIGHT):
            self._settle(*self._pending.popleft())

    def settle(self) -> None:
        """Waits for all results and adds them up."""
        while self._pending:
            self._settle(*self._pending.popleft())

    def take_means(self) -> dict[str, float]:
        """Returns the mean of each scalar over the settled steps, and starts again.

        Of the counts of the statistics, these are the last.
        """
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def stored(self) -> dict[str, Any]:
        """Returns what the constructor takes, as JSON can hold it."""
        return {
            "window": {"sums": dict(self._sums), "counts": dict(self._counts)},
            "bad_steps": {"total": self.bad_steps, "in_a_row": self.bad_in_a_row},
        }

    def _settle(self, step, scalars, negatives):
        values = jax.device_get(dict(scalars))
        if not values.pop("applied"):
            self.bad_steps += 1
            self.bad_in_a_row += 1
            pairs = next(self._order.rows(range(step, step + 1))).pair
            _log.warning(
                "step %d is not applied: loss %s, gradient norm %s; pairs %s",
                step,
                values["loss"],
                values["gradient_norm"],
                " ".join(map(str, pairs)),
            )
            return
        self.bad_in_a_row = 0
        if self._train.truth is not None and negatives:
            values |= true_false_negative_rates(
                self._train.truth, self._train.caption_image, jax.device_get(negatives)
            )
        self.last_loss = float(values["loss"])
        for name, value in values.items():
            if name in _RUNNING_COUNTS:
                self._sums[name], self._counts[name] = float(value), 1
                continue
            if np.isnan(value):  # a mean over the anchors with a negative, where there was none
                continue
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
            self._counts[name] = self._counts.get(name, 0) + 1


def true_false_negative_rates(
    truth: SceneTruth, caption_image: np.ndarray, negatives: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Returns the share of the chosen, and of the hardest, negatives that are in truth matches.

    A rate of which no negative is named is left out. `caption_image` is the [pairs] index of each
    caption's image; `negatives` are [batch] pair ids, `anchor` and those that the train step names,
    of which -1 (none, or an empty slot of the queue) does not count.
    """
    anchor = negatives["anchor"]
    rates = {}
    for kind, name in (("negative", "sampled"), ("hardest", "hardest")):
        texts, images = negatives[f"{kind}_i2t"], negatives[f"{kind}_t2i"]
        matches = np.concatenate(
            [
                truth.is_true(texts, caption_image[anchor]),
                truth.is_true(anchor, caption_image[images]),
            ]
        )
        named = np.concatenate([texts, images]) >= 0
        if named.any():
            rates[f"{name}_false_negative_rate"] = matches[named].mean()
    return rates


class DataClock:
    """Iterates over batches and measures how fast they pass and how long the loop waits."""

    def __init__(self, batches: Iterator[Any], batch_size: int):
        self._batches, self._batch_size = batches, batch_size
        self._paused = self._waited = 0.0
        self._count = 0
        self._start = self._last_taken = self._passed()

    def __next__(self) -> Any:
        before = time.monotonic()
        batch = next(self._batches)
        self._waited += time.monotonic() - before
        self._count += 1
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of all rates."""
        before = time.monotonic()
        yield
        self._paused += time.monotonic() - before

    def take_rates(self) -> dict[str, float]:
        """Returns pairs a second and the share of time that was waited since the last call."""
        since, self._last_taken = self._last_taken, self._passed()
        return self._rates(since)

    def __str__(self) -> str:
        """The same since the start, in words."""
        rates = self._rates(self._start)
        return (
            f"{rates['pairs_per_s']:.0f} pairs/s  waiting for data {rates['data_wait_share']:.0%}"
        )

    def _passed(self):
        """Returns seconds on some clock, seconds waited, and batches, up to now."""
        return np.array([time.monotonic() - self._paused, self._waited, self._count])

    def _rates(self, since):
        seconds, waited, count = self._passed() - since
        seconds = max(seconds, 1e-9)
        return {
            "pairs_per_s": float(count * self._batch_size / seconds),
            "data_wait_share": float(waited / seconds),
        }

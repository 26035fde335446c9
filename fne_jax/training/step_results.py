"""What a step leaves: scalars for the log, word of a bad batch, and which negatives were false."""

from __future__ import annotations

import logging

import jax
import numpy as np

from fne_jax.data.batches import BatchOrder
from fne_jax.data.pairs import KnownTruth, PairDataset
from fne_jax.training.bad_steps import BadSteps
from fne_jax.training.metric_log import ScalarWindow

_log = logging.getLogger(__name__)


def settle(
    window: ScalarWindow,
    bad_steps: BadSteps,
    step: int,
    scalars: dict[str, jax.Array],
    negatives: dict[str, jax.Array],
    order: BatchOrder,
    train: PairDataset,
) -> None:
    """Waits for a step's results and adds them, with the true false-negative rates if known.

    Those of a batch that was not applied are left out, and its pairs logged.
    """
    values = jax.device_get(scalars)
    applied = bool(values.pop("applied"))
    bad_steps.add(applied)
    if not applied:
        pairs = next(order.rows(range(step, step + 1))).pair
        _log.warning(
            "step %d is not applied: loss %s, gradient norm %s; pairs %s",
            step,
            values["loss"],
            values["gradient_norm"],
            " ".join(map(str, pairs)),
        )
        return
    if train.truth is not None and negatives:
        values |= true_false_negative_rates(
            train.truth, train.caption_image, jax.device_get(negatives)
        )
    window.add(values)


def true_false_negative_rates(
    truth: KnownTruth, caption_image: np.ndarray, negatives: dict[str, np.ndarray]
) -> dict[str, float]:
    """Returns the share of chosen, and of hardest, negatives that are in truth matches.

    Args:
      truth: of the training split.
      caption_image: [pairs] the image of each caption.
      negatives: [batch] pair ids, `anchor` and those that the train step names; -1 (an empty
        slot of the memory) is no match.
    """
    anchor = negatives["anchor"]
    rates = {}
    for kind in ("negative", "hardest"):
        texts, images = negatives[f"{kind}_i2t"], negatives[f"{kind}_t2i"]
        matches = np.concatenate(
            [
                truth.is_true(texts, caption_image[anchor]) & (texts >= 0),
                truth.is_true(anchor, caption_image[images]) & (images >= 0),
            ]
        )
        rates[f"{'sampled' if kind == 'negative' else kind}_false_negative_rate"] = matches.mean()
    return rates

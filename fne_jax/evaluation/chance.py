"""What recalls would be if every query ranked its candidates at random."""

from __future__ import annotations

import numpy as np

from fne_jax.evaluation.metric_names import COMPLETE
from fne_jax.evaluation.metrics import RSUM_OF
from fne_jax.model.embedded_split import EmbeddedSplit


def chance_levels(split: EmbeddedSplit) -> dict[str, float]:
    """Returns the expected recalls of random ranks, in percent, by the names of the metrics.

    `rsum` is the sum of the six by the labels. Those against every true match, `complete_...`, are
    there where that is known.

    Args:
      split: The split, for its labels and its truth alone.
    """
    images, captions = split.image_emb.shape[0], split.text_emb.shape[0]
    labels = np.bincount(split.caption_image, minlength=images)
    matches = {"": {"i2t": (labels, captions), "t2i": (np.ones(captions, int), images)}}
    if split.truth is not None:
        truth = split.truth
        matches[COMPLETE] = {"i2t": (truth.sum(axis=1), captions), "t2i": (truth.sum(0), images)}
    levels = {
        f"{source}{direction}_r{first}": 100 * float(_hit_rate(count, candidates, first).mean())
        for source, directions in matches.items()
        for direction, (count, candidates) in directions.items()
        for first in (1, 5, 10)
    }
    return levels | {"rsum": sum(levels[name] for name in RSUM_OF)}


def _hit_rate(matches, candidates, first):
    """Returns [queries], the chance of any of `matches` among the first of so many candidates."""
    place = np.arange(min(first, candidates))
    missed = (candidates - matches[:, None] - place) / (candidates - place)
    return 1 - np.maximum(missed, 0).prod(axis=1)

"""Bootstrap intervals of retrieval metrics.

What is drawn is images, each with its captions: the captions of one image are queries that rise
and fall together, and both directions of a draw see the same images.
"""

from __future__ import annotations

import numpy as np

from fne_jax.retrieval.query_scores import QueryScores

RESAMPLES = 1000
LEVEL = 95.0
_SEED = 0
# Resamples whose ranks are held at once.
_BLOCK = 64


def resampled(scores: QueryScores, stream: int = 0) -> dict[str, np.ndarray]:
    """Returns each metric in every resample, [resamples].

    Args:
      scores: of one direction's queries. Two directions over the same images are resampled
        alike.
      stream: another number draws otherwise, for another fold.
    """
    images, group = np.unique(scores.image, return_inverse=True)
    weights = _draw(len(images), stream)
    size = weights @ np.bincount(group)
    metrics = {
        name: weights @ np.bincount(group, values) / size for name, values in scores.means.items()
    }
    if scores.ranks is not None:
        metrics["medr"] = _median_ranks(scores.ranks, group, weights)
    return metrics


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Returns the percentiles that hold the middle `LEVEL` percent of [resamples] values."""
    low, high = np.percentile(samples, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return float(low), float(high)


def _draw(images, stream):
    """Returns [resamples, images], how often each image is drawn."""
    rng = np.random.default_rng([_SEED, stream])
    drawn = rng.integers(0, images, (RESAMPLES, images))
    drawn += images * np.arange(RESAMPLES)[:, None]
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * images).reshape(RESAMPLES, images)


def _median_ranks(ranks, group, weights):
    """Returns the median rank, as `QueryScores.metrics` has it, of each resample."""
    order = np.argsort(ranks)
    ranks, group = ranks[order], group[order]
    medians = []
    for start in range(0, len(weights), _BLOCK):
        upto = np.cumsum(weights[start : start + _BLOCK, group], axis=1)
        middle = [(upto[:, -1:] - 1) // 2, upto[:, -1:] // 2]
        low, high = (ranks[(upto > position).argmax(axis=1)] for position in middle)
        medians.append(np.floor((low + high) / 2) + 1)
    return np.concatenate(medians)

"""Bootstrap intervals of retrieval metrics.

What is resampled is images, each with its captions: the captions of one image are queries that
rise and fall together, and both directions see the same images in each resample.
"""

from __future__ import annotations

import numpy as np

from fne_jax.evaluation.metrics import QueryScores

RESAMPLES = 1000
LEVEL = 95.0
_SEED = 0
# Resamples held at once.
_BLOCK = 64


def resampled(scores: QueryScores, stream: int = 0) -> dict[str, np.ndarray]:
    """Returns each metric in every resample, [resamples].

    Args:
      scores: The scores of one direction's queries. Two directions over the same images are
        resampled alike.
      stream: A number for each fold, so that folds are resampled independently.
    """
    images, group = np.unique(scores.image, return_inverse=True)
    queries = np.bincount(group)
    totals = {name: np.bincount(group, values) for name, values in scores.means.items()}
    rng = np.random.default_rng([_SEED, stream])
    blocks = []
    for start in range(0, RESAMPLES, _BLOCK):
        weights = _sample_images(rng, min(_BLOCK, RESAMPLES - start), len(images))
        block = {name: weights @ total / (weights @ queries) for name, total in totals.items()}
        if scores.ranks is not None:
            block["medr"] = _median_ranks(scores.ranks, weights[:, group])
        blocks.append(block)
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Returns the percentiles that hold the middle `LEVEL` percent of [resamples] values."""
    low, high = np.percentile(samples, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return float(low), float(high)


def _sample_images(rng, resamples, images):
    """Returns [resamples, images], how often each image is in each resample."""
    sampled = rng.integers(0, images, (resamples, images))
    sampled += images * np.arange(resamples)[:, None]
    return np.bincount(sampled.ravel(), minlength=sampled.size).reshape(sampled.shape)


def _median_ranks(ranks, weights):
    """Returns `QueryScores.metrics`' median rank of each resample, of weights [resamples, queries].

    The median of a resample lies where the weights, summed in the order of the ranks, pass half.
    """
    order = np.argsort(ranks)
    ranks, upto = ranks[order], np.cumsum(weights[:, order], axis=1)
    middle = ((upto[:, -1:] - 1) // 2, upto[:, -1:] // 2)
    low, high = (ranks[(upto > position).argmax(axis=1)] for position in middle)
    return np.floor((low + high) / 2) + 1

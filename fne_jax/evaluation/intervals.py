"""Intervals of retrieval metrics, by bootstrap.

What is resampled is images, each with its captions: the captions of one image are queries that
rise and fall together, and both directions see the same images in each resample.

The mean over queries of what lies in a range, such as a recall, has Wilson's score interval (1927,
"Probable inference, the law of succession, and statistical inference") of as many queries as vary
as the resamples do. Percentiles of these would have no width where all queries are right, and would
hold a recall of 90 % only 86 times in 100 with 20 queries. Ranks, which have no upper end, have
percentiles.
"""

from __future__ import annotations

import numpy as np

from fne_jax.evaluation.metrics import QueryScores

RESAMPLES = 1000
LEVEL = 95.0
_Z = 1.959964  # the normal distribution's quantile of that level
_SEED = 0
# Resamples held at once.
_BLOCK = 64


def resampled(scores: QueryScores, stream: int = 0) -> dict[str, np.ndarray]:
    """Returns each metric in every resample, [resamples].

    Two directions over the same images are resampled alike; folds, of another stream each,
    independently.
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


def percentiles(samples: np.ndarray) -> tuple[float, float]:
    """Returns the percentiles that hold the middle `LEVEL` percent of [resamples] values."""
    low, high = np.percentile(samples, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return float(low), float(high)


def interval(value: float, samples: np.ndarray, most: float, images: int) -> tuple[float, float]:
    """Returns the ends of the interval of a mean that lies between 0 and `most`.

    Args:
      value: The mean.
      samples: [resamples] the mean in each resample.
      most: The largest value that it can have, such as 100 for percent.
      images: How many images were drawn from, which stands in where no resample differs.
    """
    share, variance = value / most, float(np.var(samples)) / most**2
    count = share * (1 - share) / variance if variance > 1e-12 else images
    spread = _Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    width = np.sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    low, high = most * (centre - width), most * (centre + width)
    # It holds the value, but for rounding.
    return max(0.0, float(min(value, low))), min(most, float(max(value, high)))


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

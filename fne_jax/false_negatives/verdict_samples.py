"""Which pairs people should judge, so that their verdicts speak for all unlabelled pairs.

Random pairs hardly hold a false negative, and the top of a list says nothing of the rest. So half
of a sample is from the hardest pairs, the 20 most similar images of each caption and captions of
each image; half is even over strata of how high a pair's lead and nearest own caption rank among
all. Each pair has the weight of the pairs that it stands for: the inverse of the probability with
which the sample drew it, by whichever half (Horvitz and Thompson, 1952, "A generalization of
sampling without replacement from a finite universe"). With that weight shares of verdicts are
shares of unlabelled pairs:

>>> weight, is_match = np.array([9.0, 9.0, 1.0, 1.0]), np.array([False, False, False, True])
>>> round(density(is_match, weight).value, 3)
0.05

Verdicts on the first part of a sample do as well: pairs come in an order whose every beginning is
spread over the strata as the whole is.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.false_negatives.judged_split import JudgedSplit
from fne_jax.false_negatives.own_captions import nearest_own_caption

# Random unlabelled pairs that stand for all that are not among the hardest.
_POOL = 300_000
# Up to which share of the unlabelled pairs, those that most speaks for first, each stratum reaches.
# Where a few percent match, the interval of their density is narrowest with strata that grow about
# so: on `shapes` of 3.2 %, 200 verdicts have a standard error of 0.8 %, and 1.5 % with even strata.
_STRATA = tuple(0.6**power for power in range(10, -1, -1))


@dataclasses.dataclass(frozen=True)
class Density:
    """The share of unlabelled pairs that match, which is what the prior of a config should be.

    Attributes:
      value: The share.
      low: The lower end of its 95 % interval.
      high: The upper end.
      verdicts: The verdicts that it is from.
    """

    value: float
    low: float
    high: float
    verdicts: int


def sample_name(split: JudgedSplit, count: int, seed: int) -> str:
    """Returns what verdicts call a sample: the model whose embeddings it goes by, and the draw."""
    return f"{split.model_name}, {count} pairs, seed {seed}"


def sample(split: JudgedSplit, count: int, seed: int) -> Pairs:
    """Returns pairs to judge with their weights, none of them twice.

    However many of the first of them are judged, these are a sample too, of about the same share of
    each stratum. Samples of another count, seed or model are independent.

    Where there are fewer unlabelled pairs than `count`, these are all.
    """
    rng = np.random.default_rng(list(sample_name(split, count, seed).encode()))
    images, hard = len(split.image_emb), split.hardest
    others = _random_others(split, rng)
    pair = np.concatenate([hard, others])
    is_hard = np.arange(len(pair)) < len(hard)
    # Of the others a random part is looked at, of which each stands for several.
    stands_for = np.where(is_hard, 1.0, (split.unlabelled - len(hard)) / max(1, len(others)))
    caption, image = np.divmod(pair, images)
    # Pairs of one cell are as likely as each other to be drawn.
    cell = 2 * _strata(split, caption, image, stands_for) + is_hard
    drawn, probability = _draw(cell, _shares(cell, stands_for), count, rng)
    return Pairs(caption[drawn], image[drawn], weight=stands_for[drawn] / probability)


def pooled(weight: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Returns the [n] weights of verdicts of several samples that stand for all pairs together.

    Each sample by itself tells the truth in the mean, so their mean does; here it is weighted by
    how many verdicts each has. A pair of two samples counts in both.

    Args:
      weight: [n] how many pairs each verdict stands for in its own sample.
      sample: [n] the sample of each.
    """
    _, row, number = np.unique(sample, return_inverse=True, return_counts=True)
    return weight * number[row] / len(weight)


def density(is_match: np.ndarray, weight: np.ndarray, sample: np.ndarray | None = None) -> Density:
    """Returns the share of unlabelled pairs that match, by the verdicts on random samples.

    Args:
      is_match: [n] bool verdicts, n at least 1. Any part of a sample will do that does not depend
        on what the verdicts are, such as the first of it.
      weight: [n] how many pairs each stands for in its own sample.
      sample: [n] the sample of each; None of a single one.
    """
    is_match, weight = np.asarray(is_match, float), np.asarray(weight, float)
    sample = np.zeros(len(weight)) if sample is None else sample
    share = pooled(weight, sample)
    share /= share.sum()
    value = float(share @ is_match)
    if not 0 < value < 1:
        # As far as so many verdicts that all agree could mislead one time in twenty.
        width = 1 - 0.05 ** (share**2).sum()
        return Density(value, max(0.0, value - width), min(1.0, value + width), len(weight))
    # The strata of each sample, which are known by their weights: pairs of one weight.
    keys = np.stack([weight, np.unique(sample, return_inverse=True)[1]])
    (weight, _), stratum, number = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
    each = np.bincount(stratum.ravel(), share) / number
    # The few verdicts of a stratum may all agree by chance: its rate is taken with one verdict more
    # that is worth the mean, and half a verdict more of each is as uncertain as the mean pair.
    rate = (np.bincount(stratum.ravel(), is_match) + value) / (number + 1)
    spread = number * rate * (1 - rate) + 0.5 * value * (1 - value)
    # Where a weight is near 1 nearly all such pairs are judged, and little is left to chance.
    variance = (each**2 * (1 - np.minimum(1, 1 / weight)) * spread).sum()
    # On the scale of log odds, where an interval cannot leave (0, 1).
    odds, width = np.log(value / (1 - value)), 1.96 * np.sqrt(variance) / (value * (1 - value))
    low, high = 1 / (1 + np.exp(-(odds + np.array([-width, width]))))
    return Density(value, float(low), float(high), len(is_match))


def _random_others(split, rng):
    """Returns random unlabelled pairs that are not among the hardest, none of them twice."""
    images, captions = len(split.image_emb), len(split.text_emb)
    own = np.arange(captions) * images + split.caption_image
    left_out = np.sort(np.concatenate([split.hardest, own]))
    wanted = min(_POOL, captions * images - len(left_out))
    if captions * images <= 4 * _POOL:
        others = np.setdiff1d(np.arange(captions * images), left_out, assume_unique=True)
        return rng.permutation(others)[:wanted]
    found = np.zeros(0, np.int64)
    while len(found) < wanted:
        more = rng.integers(captions * images, size=wanted)
        place = np.minimum(np.searchsorted(left_out, more), len(left_out) - 1)
        found = np.append(found, more[left_out[place] != more])
        # The first of each stays, in the order of the draws.
        found = found[np.sort(np.unique(found, return_index=True)[1])][:wanted]
    return found


def _strata(split, caption, image, stands_for):
    """Returns [pool] the stratum of each pair, by its mean rank; 0 is what most speaks for.

    The mean is geometric: a pair that ranks high by one of the two is never far down.
    """
    lead = split.similarity(caption, image) - split.own_similarity[caption]
    nearest, _ = nearest_own_caption(split.caption_bank, split.own, caption, image)
    mean = np.log(_rank(lead, stands_for)) + np.log(_rank(nearest, stands_for))
    return np.searchsorted(_STRATA[:-1], _rank(-mean, stands_for))


def _rank(score, stands_for):
    """Returns which share of all pairs scores higher, half of the equals counted; in (0, 1)."""
    _, step = np.unique(-score, return_inverse=True)
    mass = np.bincount(step, weights=stands_for)
    return ((np.cumsum(mass) - mass / 2) / mass.sum())[step]


def _shares(cell, stands_for):
    """Returns [cells] the share of the verdicts that each cell gets of both halves."""
    mass = np.bincount(cell, weights=stands_for, minlength=2 * len(_STRATA)).reshape(-1, 2)
    of_hard = mass * [0, 1] / mass[:, 1].sum()
    of_stratum = mass.sum(axis=1, keepdims=True)
    of_strata = mass / np.maximum(of_stratum, 1) / np.count_nonzero(of_stratum)
    return (of_hard + of_strata).ravel() / 2


def _draw(cell, share, count, rng):
    """Returns the rows that are drawn, and the probability of each.

    They stand in an order in which each beginning has its part of every cell, give or take a row.
    """
    number = np.bincount(cell, minlength=len(share))
    expected = _expected(number, share, min(count, len(cell)))
    # Rounded at random such that each is right in the mean, and the sum always.
    ends = np.floor(np.round(np.cumsum(expected), 6) + rng.random()).astype(int)
    taken = np.diff(np.append(0, ends))
    order = rng.permutation(len(cell))
    order = order[np.argsort(cell[order], kind="stable")]
    position = np.arange(len(cell)) - np.repeat(np.cumsum(number) - number, number)
    kept = position < taken[cell[order]]
    drawn, position = order[kept], position[kept]
    of = cell[drawn]
    drawn = drawn[np.argsort((position + rng.random(len(share))[of]) / taken[of])]
    return drawn, np.minimum(1.0, expected / np.maximum(number, 1))[cell[drawn]]


def _expected(number, share, count):
    """Returns [cells] how many are drawn of each in the mean, none more than there are."""
    expected, wanting = np.zeros(len(number)), number > 0
    while True:
        left = count - expected[~wanting].sum()
        expected[wanting] = left * share[wanting] / share[wanting].sum()
        full = wanting & (expected >= number)
        expected[full] = number[full]
        wanting &= ~full
        if not full.any() or not wanting.any():
            return expected

"""Which candidate becomes an anchor's negative: FNE's weights, and sampling by them.

Two anchors and three keys, the first two of which are the anchors' own matches, while similarities
of true matches are at 0.7 on average and the hardest negatives' at 0.4:

            key 0    key 1    key 2
  anchor 0  0.8 own  0.6      0.9
  anchor 1  0.3      0.7 own  0.65

Own matches weigh 0. Key 0 weighs 0 for anchor 1 too: a similarity of 0.3 is no more than 0.7 less
the margin of 0.2, too easy to matter. Key 2 is suspected of being a false negative of anchor 0,
with a posterior of 0.92, and weighs exp(-0.5 * 0.92) = 0.63. The other two are ordinary: they weigh
the more the nearer they are to the positive, exp(-0.5 (0.6 - 0.8)^2) = 0.98 and
exp(-0.5 (0.65 - 0.7)^2) = 1.00.

>>> import jax.numpy as jnp
>>> from fne_jax.objectives.similarity_statistics import GaussianStatistics
>>> similarity = jnp.array([[0.8, 0.6, 0.9], [0.3, 0.7, 0.65]])
>>> same_image = jnp.array([[True, False, False], [False, True, False]])
>>> stats = SimilarityStatistics(
...     positive=GaussianStatistics.from_moments(500, mean=0.7, variance=0.01),
...     negative=GaussianStatistics.from_moments(1000, mean=0.4, variance=0.02),
... )
>>> weights = sampling_weights(
...     similarity, jnp.array([0.8, 0.7]), same_image, stats, prior=0.1, posterior_threshold=0.5
... )
>>> for row in weights.tolist():
...     print([round(weight, 2) for weight in row])
[0.0, 0.98, 0.63]
[0.0, 0.0, 1.0]

A uniform number picks the first key whose cumulative weight exceeds that share of the row's total:
0.5 of 1.61 lies within key 1, 0.7 of it within key 2.

>>> fallback = jnp.array([0, 0])  # for rows whose weights are all 0
>>> sample_negatives_from_uniform(jnp.array([0.5, 0.5]), weights, fallback).tolist()
[1, 2]
>>> sample_negatives_from_uniform(jnp.array([0.7, 0.5]), weights, fallback).tolist()
[2, 2]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.fne_settings import FNESettings
from fne_jax.objectives.similarity_statistics import SimilarityStatistics, false_negative_posterior

# Columns whose weights are summed before any cumulative sum. About the square root of a large
# key count, so that neither the sums over groups nor the search inside one costs much.
GROUP = 128


def sampling_weights(
    similarity: jax.Array,
    positive_similarity: jax.Array,
    same_image: jax.Array,
    stats: SimilarityStatistics,
    **settings,
) -> jax.Array:
    """Returns how much each candidate deserves to be the negative.

    Ordinary candidates weigh `exp(-tau (s - d)^2)`, with s their similarity to the anchor and d
    that of the anchor's own match: the harder, the more. Suspected false negatives weigh
    `exp(-elimination_tau P)`, with P their posterior. Keys of the anchor's own image, and
    candidates too easy to matter (`s <= mean positive similarity - margin`), weigh 0. The head of
    this module works an example.

    Args:
      similarity: [batch, keys] cosine similarity of each anchor to each key.
      positive_similarity: [batch] cosine similarity of each anchor to its own match.
      same_image: [batch, keys] bool, true where a key shows the anchor's image.
      stats: The similarity statistics, already updated for this batch.
      **settings: The fields of `FNESettings` by name: `margin=0.2` of the triplet loss; `tau=0.5`
        and `elimination_tau=None` (as `tau`), the strengths above; `prior=1e-4`, the share of
        candidates that are unlabelled matches; `posterior_threshold=1e-3`, above which a candidate
        is suspected; `min_count=200`, the positive similarities that must have been seen before
        any is; `monotone=False`, whether the posterior is kept from falling as similarity rises.
        `decay` and `elimination_decay` are deprecated names of `tau` and `elimination_tau`.

    Returns:
      [batch, keys] float32 weights, at least 0, without gradient. A row may be all 0.

    Raises:
      TypeError: on an unknown setting.
      ValueError: on a wrong shape or a setting out of range.

    References:
      Li et al., Your Negative May not Be True Negative, ACM MM 2023, arXiv 2308.04380, section 3.3.
    """
    settings = FNESettings.from_keywords(settings)
    if jnp.ndim(similarity) != 2:
        raise ValueError(f"similarity: expected shape [batch, keys], got {jnp.shape(similarity)}")
    checks.shape("positive_similarity", positive_similarity, (similarity.shape[0],))
    checks.shape("same_image", same_image, similarity.shape)
    batch, keys = similarity.shape
    if keys < batch:
        raise ValueError(
            f"similarity: expected at least as many keys as the {batch} anchors, which each have "
            f"their own match among them, got {keys}"
        )
    return candidate_weight(
        jax.lax.stop_gradient(similarity).astype(jnp.float32),
        jax.lax.stop_gradient(positive_similarity)[:, None],
        same_image,
        stats,
        settings,
    )


def candidate_weight(
    similarity: jax.Array,
    positive_similarity: jax.Array,
    same_image: jax.Array,
    stats: SimilarityStatistics,
    settings: FNESettings,
) -> jax.Array:
    """Returns what candidates weigh, element by element, for arrays of any layout.

    Args:
      similarity: float32 similarities of candidates to their anchors.
      positive_similarity: Similarities of the anchors to their own matches.
      same_image: bool, true where a key is no candidate: it shows its anchor's image, or is known
        to match.
      stats: The similarity statistics.
      settings: The constants of the method.

    Returns:
      The float32 weights, of the shape to which the three arrays broadcast.
    """
    elimination_tau = settings.tau if settings.elimination_tau is None else settings.elimination_tau
    posterior = false_negative_posterior(
        similarity, stats, settings.prior, monotone=settings.monotone
    )
    suspected = stats.positive.count > settings.min_count
    suspected &= posterior > settings.posterior_threshold
    exponent = jnp.where(
        suspected,
        elimination_tau * posterior,
        settings.tau * jnp.square(similarity - positive_similarity),
    )
    too_easy = similarity <= stats.positive.mean - settings.margin
    return jnp.where(same_image | too_easy, 0.0, jnp.exp(-exponent))


def sample_negatives(rng: jax.Array, weights: jax.Array, fallback: jax.Array) -> jax.Array:
    """Returns one key for each anchor, sampled with probability proportional to its weight.

    >>> import jax, jax.numpy as jnp
    >>> weights = jnp.array([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    >>> sample_negatives(jax.random.key(0), weights, fallback=jnp.array([0, 2])).tolist()
    [1, 2]

    Args:
      rng: PRNG key.
      weights: [batch, keys] weights, at least 0.
      fallback: [batch] integer index returned for rows whose weights are all 0.

    Returns:
      [batch] int32 indices. An entry of weight 0 is never sampled.

    Raises:
      ValueError: on a wrong shape or dtype.
    """
    return sample_negatives_from_uniform(
        jax.random.uniform(rng, jnp.shape(weights)[:1]), weights, fallback
    )


def sample_negatives_from_uniform(
    uniform: jax.Array, weights: jax.Array, fallback: jax.Array
) -> jax.Array:
    """Returns the first key whose cumulative weight exceeds `uniform` times the row's total.

    This is `sample_negatives` with its randomness as an argument, for replays. Sums are taken over
    groups of columns and then inside the chosen group: one float32 cumulative sum over a long row
    is neither monotone nor cheap. The head of this module works an example.

    Args:
      uniform: [batch] numbers in [0, 1).
      weights: [batch, keys] weights, at least 0.
      fallback: [batch] integer index returned for rows whose weights are all 0.

    Returns:
      [batch] int32 indices. An entry of weight 0 is never sampled.

    Raises:
      ValueError: on a wrong shape or dtype.
    """
    if jnp.ndim(weights) != 2:
        raise ValueError(f"weights: expected shape [batch, keys], got {jnp.shape(weights)}")
    batch = weights.shape[0]
    checks.shape("uniform", uniform, (batch,))
    checks.ids("fallback", fallback, batch)
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    index, _, total = sample_entry(uniform, weights)
    return jnp.where(total > 0, index, fallback).astype(jnp.int32)


def sample_entry(uniform: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the entry on which each row's uniform number falls.

    Args:
      uniform: [batch] numbers in [0, 1).
      weights: [batch, n] float32, at least 0.

    Returns:
      The [batch] int32 index of the entry, meaningless where a row is all 0; [batch] by how much
      `uniform` times the total exceeds the sum of the entries before it; and the [batch] totals.
    """
    n = weights.shape[1]
    grouped = n - n % GROUP
    sums = weights[:, :grouped].reshape(weights.shape[0], -1, GROUP).sum(axis=-1)
    sums = jnp.concatenate([sums, weights[:, grouped:].sum(axis=-1, keepdims=True)], axis=1)
    total = sums.sum(axis=1)
    group, target = first_exceeding(uniform.astype(jnp.float32) * total, sums)
    # Reading past the last column would repeat it, so those columns are masked to weight 0.
    column = group[:, None] * GROUP + jnp.arange(GROUP)[None, :]
    inside = jnp.take_along_axis(weights, jnp.minimum(column, n - 1), axis=1)
    inside = jnp.where(column < n, inside, 0.0)
    offset, target = first_exceeding(target, inside)
    return (group * GROUP + offset).astype(jnp.int32), target, total


def first_exceeding(target: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each row's first positive entry whose running total exceeds the target, and the rest.

    Args:
      target: [batch] numbers in [0, total).
      weights: [batch, n] weights, with a positive entry in every row that matters.

    Returns:
      The [batch] index, and [batch] the target less the running total before that index.
    """
    running = jnp.cumsum(weights, axis=1)
    positive = weights > 0
    exceeds = positive & (running > target[:, None])
    # Rounding can leave the target at or above the last running total; the last entry that could
    # have been sampled is then the right one.
    last_positive = weights.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=1)
    index = jnp.where(exceeds.any(axis=1), jnp.argmax(exceeds, axis=1), last_positive)
    before = jnp.take_along_axis(running - weights, index[:, None], axis=1)[:, 0]
    return index, jnp.maximum(target - before, 0.0)

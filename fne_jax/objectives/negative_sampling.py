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
>>> excluded = jnp.array([[True, False, False], [False, True, False]])
>>> stats = SimilarityStatistics(
...     positive=GaussianStatistics.from_moments(500, mean=0.7, variance=0.01),
...     negative=GaussianStatistics.from_moments(1000, mean=0.4, variance=0.02),
... )
>>> positive_similarity = jnp.array([[0.8], [0.7]])
>>> weights = sampling_weights(
...     similarity, positive_similarity, excluded, stats, prior=0.1, posterior_threshold=0.5
... )
>>> for row in weights.tolist():
...     print([round(weight, 2) for weight in row])
[0.0, 0.98, 0.63]
[0.0, 0.0, 1.0]

A uniform number picks the first key whose cumulative weight exceeds that share of the row's total:
0.5 of 1.61 lies within key 1, 0.7 of it within key 2.

>>> fallback = jnp.array([0, 0])  # for rows whose weights are all 0
>>> _sample_from_uniform(jnp.array([0.5, 0.5]), weights, fallback).tolist()
[1, 2]
>>> _sample_from_uniform(jnp.array([0.7, 0.5]), weights, fallback).tolist()
[2, 2]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.similarity_statistics import SimilarityStatistics, false_negative_posterior

# Float32 holds exp(-80), so that with this tau no posterior takes a weight below what it can hold.
_ELIMINATES_NONE = 80.0
# Columns whose weights are summed before any cumulative sum. About the square root of a large
# key count, so that neither the sums over groups nor the search inside one costs much.
GROUP = 128


def sampling_weights(
    similarity: jax.Array,
    positive_similarity: jax.Array,
    excluded: jax.Array,
    stats: SimilarityStatistics,
    *,
    margin: float = 0.2,
    tau: float = 0.5,
    elimination_tau: float | None = None,
    prior: float = 1e-4,
    posterior_threshold: float | None = None,
    min_count: int = 200,
    monotone: bool = False,
    posterior: jax.Array | None = None,
) -> jax.Array:
    """Returns how much each candidate deserves to be the negative.

    Ordinary candidates weigh `exp(-tau (s - d)^2)`, with s their similarity to the anchor and d
    that of the anchor's own match: the harder, the more. Suspected false negatives weigh
    `exp(-elimination_tau P)`, with P their posterior. Keys that are no candidates, and candidates
    too easy to matter (`s <= mean positive similarity - margin`), weigh 0. The head of this module
    works an example.

    The first three arrays may have any layout, such as [batch, keys]; they have as many axes as
    each other, and broadcast.

    Args:
      similarity: Cosine similarities of candidates to their anchors.
      positive_similarity: Those of the anchors to their own matches.
      excluded: bool, true where a key is no candidate: it shows its anchor's image, or is known to
        match.
      stats: The similarity statistics, already updated for this batch.
      margin: That of the triplet loss, at least 0.
      tau: Strength of the weight of ordinary candidates, at least 0; 0 makes them all equal.
      elimination_tau: Strength of the weight of suspected ones, at least 0; None takes `tau`, as
        the paper does. Those whose weight it takes below what float32 can hold are eliminated.
      prior: Share of candidates that are unlabelled matches, in (0, 1).
      posterior_threshold: Posterior above which a candidate is suspected, in [0, 1]; 1 suspects
        none. None takes `suspicion_threshold(prior)`.
      min_count: Positive similarities that must have been seen before anything is suspected.
      monotone: Whether the posterior is held where the authors' formula would fall as similarity
        rises.
      posterior: The probability of each candidate to be a match where a list tells it, shaped as
        `similarity`; it needs no `min_count`. None takes `false_negative_posterior`.

    Returns:
      The float32 weights, at least 0, without gradient. Those of an anchor may all be 0.

    Raises:
      ValueError: on a wrong shape or dtype, or a setting out of range.

    References:
      Li et al., Your Negative May not Be True Negative, ACM MM 2023, arXiv 2308.04380, section 3.3.
    """
    return weights_and_candidates(**locals())[0]  # the same arguments


def weights_and_candidates(
    similarity: jax.Array,
    positive_similarity: jax.Array,
    excluded: jax.Array,
    stats: SimilarityStatistics,
    *,
    margin: float = 0.2,
    tau: float = 0.5,
    elimination_tau: float | None = None,
    prior: float = 1e-4,
    posterior_threshold: float | None = None,
    min_count: int = 200,
    monotone: bool = False,
    posterior: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns `sampling_weights`, and which keys may be negatives where all weights are 0.

    Weight 0 alone does not tell: a candidate that is too easy may still be one, an excluded or an
    eliminated key may not. Eliminated are suspected ones with an `exp(-elimination_tau P)` of 0 in
    float32, too easy or not; with the paper's tau there are none.
    """
    elimination_tau = tau if elimination_tau is None else elimination_tau
    checks.in_range("margin", margin, 0)
    checks.in_range("tau", tau, 0)
    checks.in_range("elimination_tau", elimination_tau, 0)
    checks.in_range("min_count", min_count, 0)
    checks.mask("excluded", excluded)
    shapes = [jnp.shape(array) for array in (similarity, positive_similarity, excluded)]
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(
            "similarity, positive_similarity, excluded: expected as many axes as each other, got "
            f"shapes {', '.join(map(str, shapes))}"
        )
    similarity, positive_similarity = jax.lax.stop_gradient((similarity, positive_similarity))
    similarity = similarity.astype(jnp.float32)
    seen = True
    if posterior is None:
        posterior = false_negative_posterior(similarity, stats, prior, monotone=monotone)
        seen = stats.positive.count > min_count
    threshold = suspicion_threshold(prior) if posterior_threshold is None else posterior_threshold
    checks.in_range("posterior_threshold", threshold, 0, 1)
    suspected = seen & (posterior > threshold)
    exponent = jnp.where(
        suspected, elimination_tau * posterior, tau * jnp.square(similarity - positive_similarity)
    )
    weight = jnp.exp(-exponent)
    too_easy = similarity <= stats.positive.mean - margin
    candidate = ~excluded
    # Known before anything is compiled, where it is no array, so that the paper's costs nothing.
    if isinstance(elimination_tau, jax.Array) or elimination_tau > _ELIMINATES_NONE:
        candidate = candidate & ~(suspected & (weight == 0))
    return jnp.where(excluded | too_easy, 0.0, weight), candidate


def suspicion_threshold(prior: float | jax.Array) -> float | jax.Array:
    """Returns the posterior above which a candidate is suspected: 10 times the prior, at most 0.5.

    Ten times is the paper's, 1e-3 with a prior of 1e-4. Where that is no probability any more, what
    is likelier a match than not is suspected.
    """
    least = jnp.minimum if isinstance(prior, jax.Array) else min
    return least(10 * prior, 0.5)


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
    uniform = jax.random.uniform(rng, jnp.shape(weights)[:1], jnp.float32)
    return _sample_from_uniform(uniform, weights, fallback)


def _sample_from_uniform(uniform: jax.Array, weights: jax.Array, fallback: jax.Array) -> jax.Array:
    """Returns the first key whose cumulative weight exceeds `uniform` times the row's total.

    This is `sample_negatives` of [batch] numbers in [0, 1), for replays. Sums are taken over groups
    of columns and then inside the chosen group: one float32 cumulative sum over a long row is
    neither monotone nor cheap. The head of this module works an example.
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
    """Returns the entry of [batch, n] float32 weights on which each row's number in [0, 1) falls.

    That is its [batch] int32 index, meaningless where a row is all 0; [batch] by how much `uniform`
    times the total exceeds the sum of the entries before it; and the [batch] totals.
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

    That is the [batch] index, and the [batch] target less the running total before it. Targets are
    [batch] numbers in [0, total), and [batch, n] weights have a positive entry in every row that
    matters.
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

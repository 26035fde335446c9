"""Which candidate becomes an anchor's negative: FNE's weights and the draw from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.similarity_statistics import SimilarityStatistics, false_negative_posterior

# Columns whose weights are summed before any cumulative sum. About the square root of a large
# key count, so that neither the sums over groups nor the search inside one costs much.
GROUP = 128


def sampling_weights(
    similarity: jax.Array,
    positive_similarity: jax.Array,
    same_image: jax.Array,
    stats: SimilarityStatistics,
    *,
    margin: float = 0.2,
    decay: float = 0.5,
    elimination_decay: float | None = None,
    prior: float = 1e-4,
    posterior_threshold: float = 1e-3,
    min_count: int = 200,
    monotone: bool = False,
) -> jax.Array:
    """Returns how much each candidate deserves to be the negative (section 3.3 of the paper).

    Ordinary candidates weigh `exp(-decay (s - d)^2)`: the harder, the more. Suspected false
    negatives weigh `exp(-elimination_decay P)` with P their posterior. Keys of the anchor's own
    image, and candidates too easy to matter (`s <= mean positive similarity - margin`), weigh 0.

    Args:
      similarity: [batch, keys] cosine similarity of each anchor to each key.
      positive_similarity: [batch] cosine similarity of each anchor to its own match.
      same_image: [batch, keys] bool, true where a key shows the anchor's image.
      stats: the similarity statistics, already updated for this batch.
      margin: the triplet margin.
      decay: tau in the paper; 0 makes all ordinary candidates equal.
      elimination_decay: tau for suspected false negatives, the same as `decay` by default. A
        very large number removes the suspected altogether.
      prior: see `false_negative_posterior`.
      posterior_threshold: posterior above which a candidate is suspected; 1 suspects none.
      min_count: positive similarities that must have been seen before anything is suspected.
      monotone: see `false_negative_posterior`.

    Returns:
      [batch, keys] float32 weights, at least 0, without gradient. A row may be all 0.

    Raises:
      ValueError: on a wrong shape or a setting out of range.
    """
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
        margin=margin,
        decay=decay,
        elimination_decay=elimination_decay,
        prior=prior,
        posterior_threshold=posterior_threshold,
        min_count=min_count,
        monotone=monotone,
    )


def candidate_weight(
    similarity: jax.Array,
    positive_similarity: jax.Array,
    same_image: jax.Array,
    stats: SimilarityStatistics,
    *,
    margin: float,
    decay: float,
    elimination_decay: float | None,
    prior: float,
    posterior_threshold: float,
    min_count: int,
    monotone: bool,
) -> jax.Array:
    """Returns `sampling_weights` element by element, of arrays that broadcast in any layout."""
    checks.in_range("margin", margin, 0)
    checks.in_range("decay", decay, 0)
    checks.in_range("posterior_threshold", posterior_threshold, 0, 1)
    checks.in_range("min_count", min_count, 0)
    elimination_decay = decay if elimination_decay is None else elimination_decay
    checks.in_range("elimination_decay", elimination_decay, 0)
    posterior = false_negative_posterior(similarity, stats, prior, monotone=monotone)
    suspected = (stats.positive.count > min_count) & (posterior > posterior_threshold)
    exponent = jnp.where(
        suspected,
        elimination_decay * posterior,
        decay * jnp.square(similarity - positive_similarity),
    )
    ruled_out = same_image | (similarity <= stats.positive.mean - margin)
    return jnp.where(ruled_out, 0.0, jnp.exp(-exponent))


def sample_negatives(rng: jax.Array, weights: jax.Array, fallback: jax.Array) -> jax.Array:
    """Draws one key for each anchor with probability proportional to its weight.

    Args:
      rng: PRNG key.
      weights: [batch, keys] weights, at least 0.
      fallback: [batch] integer index returned for rows whose weights are all 0.

    Returns:
      [batch] int32 indices. An entry of weight 0 is never drawn.

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

    The draw of `sample_negatives` with its randomness as an argument. Sums are taken over blocks
    of columns and then inside the chosen block: one float32 cumulative sum over a long row is
    neither monotone nor cheap.

    Args:
      uniform: [batch] numbers in [0, 1).
      weights: [batch, keys] weights, at least 0.
      fallback: [batch] integer index returned for rows whose weights are all 0.

    Returns:
      [batch] int32 indices.

    Raises:
      ValueError: on a wrong shape or dtype.
    """
    if jnp.ndim(weights) != 2:
        raise ValueError(f"weights: expected shape [batch, keys], got {jnp.shape(weights)}")
    batch = weights.shape[0]
    checks.shape("uniform", uniform, (batch,))
    checks.ids("fallback", fallback, batch)
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    index, _, total = draw(uniform, weights)
    return jnp.where(total > 0, index, fallback).astype(jnp.int32)


def draw(uniform: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the entry that each row's uniform number falls on.

    Args:
      uniform: [batch] numbers in [0, 1).
      weights: [batch, n] float32, at least 0.

    Returns:
      [batch] index, meaningless where a row is all 0; [batch] what is left of `uniform` times the
      total beyond the entries before it; [batch] the row's total.
    """
    n = weights.shape[1]
    whole = n - n % GROUP
    sums = weights[:, :whole].reshape(weights.shape[0], -1, GROUP).sum(axis=-1)
    sums = jnp.concatenate([sums, weights[:, whole:].sum(axis=-1, keepdims=True)], axis=1)
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
      target: [batch] in [0, total).
      weights: [batch, n], with a positive entry in every row that matters.

    Returns:
      [batch] index, and [batch] the target less the running total before that index.
    """
    running = jnp.cumsum(weights, axis=1)
    positive = weights > 0
    exceeds = positive & (running > target[:, None])
    # Rounding can leave the target at or above the last running total; the last entry that could
    # have been drawn is then the right one.
    last_positive = weights.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=1)
    index = jnp.where(exceeds.any(axis=1), jnp.argmax(exceeds, axis=1), last_positive)
    before = jnp.take_along_axis(running - weights, index[:, None], axis=1)[:, 0]
    return index, jnp.maximum(target - before, 0.0)

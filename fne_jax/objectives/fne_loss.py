"""The loss of False Negative Elimination (Li et al. 2023, arXiv 2308.04380), from features to loss.

For each image anchor, and likewise for each text anchor, among the batch's momentum keys and the
queue's:

  1. similarities give each candidate a weight (`negative_sampling`), which asks the similarity
     statistics how likely the candidate is a false negative (`similarity_statistics`);
  2. one negative is sampled by weight, or, where every weight is 0, the hardest of those that are
     not eliminated is taken;
  3. the triplet loss compares it with the anchor's own match (`triplet_loss`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.features import Features
from fne_jax.objectives.key_blocks import BLOCK, KeyBlocks
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.negative_sampling import (
    first_exceeding,
    sample_entry,
    weights_and_candidates,
)
from fne_jax.objectives.similarity_statistics import SimilarityStatistics, false_negative_posterior
from fne_jax.objectives.triplet_loss import Choice, TripletAux, triplet_loss_of_choices


def fne_triplet_loss(
    features: Features,
    queue: MemoryQueue | None,
    stats: SimilarityStatistics,
    rng: jax.Array,
    *,
    margin: float = 0.2,
    tau: float = 0.5,
    elimination_tau: float | None = None,
    prior: float = 1e-4,
    posterior_threshold: float | None = None,
    min_count: int = 200,
    monotone: bool = False,
    key_chunk: int | None = None,
) -> tuple[jax.Array, TripletAux]:
    """Returns the triplet loss over negatives sampled by false-negative elimination.

    Gradients flow into the online embeddings through the chosen negative and the positive alone,
    so the backward pass holds no [batch, keys] matrix.

    >>> import jax, jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> # The online embeddings stand for the momentum encoders' here.
    >>> features = Features(image_emb, text_emb, image_emb, text_emb, jnp.arange(2))
    >>> stats = SimilarityStatistics.create()
    >>> loss, aux = jax.jit(fne_triplet_loss)(features, None, stats, jax.random.key(0), margin=0.3)
    >>> print(f"{loss:.3f}", aux.negative_i2t.tolist())
    0.200 [1, 0]

    Args:
      features: The embeddings of the batch. Matches that are known by their probability are
        suspected by it, and all other candidates not at all.
      queue: The queue of momentum embeddings, or None for the batch's keys only.
      stats: The similarity statistics, already updated for this batch.
      rng: PRNG key from which the negatives are sampled.
      margin: Similarity by which the positive should win, at least 0.
      tau: See `sampling_weights`, as for the five that follow.
      elimination_tau: Of suspected candidates.
      prior: Of being an unlabelled match.
      posterior_threshold: Above which a candidate is suspected.
      min_count: Before which none is.
      monotone: Whether the posterior never falls.
      key_chunk: Keys of the queue that are scored at a time, a multiple of 16, so that scratch
        memory is O(batch * key_chunk) rather than O(batch * keys); None scores all at once.

    Returns:
      The [] float32 loss, summed over both directions and divided by the batch, and a TripletAux.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      Li et al., Your Negative May not Be True Negative, ACM MM 2023, arXiv 2308.04380, section 3.
    """
    return _loss_from_uniforms(
        jax.random.uniform(rng, (2, jnp.shape(features.image)[0]), jnp.float32),
        features,
        queue,
        stats,
        margin=margin,
        key_chunk=key_chunk,
        tau=tau,
        elimination_tau=elimination_tau,
        prior=prior,
        posterior_threshold=posterior_threshold,
        min_count=min_count,
        monotone=monotone,
    )


def _loss_from_uniforms(
    uniforms: jax.Array,
    features: Features,
    queue: MemoryQueue | None,
    stats: SimilarityStatistics,
    *,
    margin: float = 0.2,
    prior: float = 1e-4,
    monotone: bool = False,
    key_chunk: int | None = None,
    **weighing,
) -> tuple[jax.Array, TripletAux]:
    """Returns `fne_triplet_loss` of uniform numbers in [0, 1), to replay a recorded run.

    They are [2, batch], by which the image anchors' and the text anchors' negatives are sampled.
    """
    checks.shape("uniforms", uniforms, (2, len(features.image)))
    if key_chunk is not None and (key_chunk < BLOCK or key_chunk % BLOCK):
        raise ValueError(f"key_chunk: expected a multiple of {BLOCK} or None, got {key_chunk}")
    posterior = {"stats": stats, "prior": prior, "monotone": monotone}
    settings = {"margin": margin, **posterior, **weighing}

    def weigh(similarity, positive, excluded, probability):
        return weights_and_candidates(
            similarity, positive, excluded, posterior=probability, **settings
        )

    def choose(uniform, direction):
        blocks = KeyBlocks(direction, features.split, weigh)
        return _choose(uniform, blocks, margin, key_chunk)

    return triplet_loss_of_choices(
        choose,
        uniforms,
        features,
        queue,
        functools.partial(false_negative_posterior, **posterior),
        margin=margin,
    )


def _choose(uniform, blocks, margin, key_chunk):
    """Returns the Choice of one direction, sampled by weight or else the hardest."""
    block_weight, block_best = blocks.table(key_chunk)

    index, similarity, _, candidate = blocks.scores(block_best.argmax(axis=1).astype(jnp.int32))
    candidates = jnp.where(candidate, similarity, -jnp.inf)
    hardest = jnp.where(candidate.any(axis=1), _pick(index, candidates.argmax(axis=1)), -1)
    violates = margin + candidates.max(axis=1) - blocks.positive > 0
    fallback = jnp.where(violates, hardest, 0)

    block, target, _ = sample_entry(uniform, block_weight)
    index, _, weight, _ = blocks.scores(block)
    offset, _ = first_exceeding(target, weight)
    # Also false where rounding gave a block a weight that none of its keys has.
    sampled = _pick(weight, offset) > 0
    # Where nothing can be sampled or violates the margin, the index may name the anchor's own
    # image: no loss there.
    chosen = jnp.where(sampled, _pick(index, offset), fallback)
    return Choice(chosen, hardest, sampled, sampled | violates)


def _pick(matrix, index):
    """Returns the [batch] entries of a [batch, n] matrix at the rows' indices."""
    return jnp.take_along_axis(matrix, index[:, None], axis=1)[:, 0]

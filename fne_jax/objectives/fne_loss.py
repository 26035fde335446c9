"""The loss of False Negative Elimination (Li et al. 2023, arXiv 2308.04380), from features to loss.

For each image anchor, and likewise for each text anchor, among the batch's momentum keys and the
queue's:

  1. similarities give each candidate a weight (`negative_sampling`), which asks the similarity
     statistics how likely the candidate is a false negative (`similarity_statistics`);
  2. one negative is sampled by weight, or, where every weight is 0, the hardest is taken;
  3. the triplet loss compares it with the anchor's own match (`triplet_loss`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.features import Features, Matches, check_features, directions
from fne_jax.objectives.fne_settings import FNESettings
from fne_jax.objectives.key_blocks import KeyBlocks, Weigh
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.negative_sampling import candidate_weight, first_exceeding, sample_entry
from fne_jax.objectives.similarity_statistics import SimilarityStatistics, false_negative_posterior
from fne_jax.objectives.triplet_loss import Choice, TripletAux, triplet_loss_of_choices


def fne_triplet_loss(
    rng: jax.Array,
    image_emb: jax.Array,
    text_emb: jax.Array,
    momentum_image_emb: jax.Array,
    momentum_text_emb: jax.Array,
    image_id: jax.Array,
    queue: MemoryQueue | None,
    stats: SimilarityStatistics,
    *,
    matches: Matches | None = None,
    **settings,
) -> tuple[jax.Array, TripletAux]:
    """Returns the triplet loss over negatives sampled by false-negative elimination.

    Gradients flow into the online embeddings through the chosen negative and the positive alone,
    so the backward pass holds no [batch, keys] matrix.

    >>> import jax, jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> momentum = image_emb, text_emb  # stand for the momentum encoders' embeddings
    >>> stats = SimilarityStatistics.create()
    >>> loss, aux = jax.jit(fne_triplet_loss)(
    ...     jax.random.key(0), image_emb, text_emb, *momentum, image_id=jnp.arange(2),
    ...     queue=None, stats=stats, margin=0.3,
    ... )
    >>> print(f"{loss:.3f}", aux.negative_i2t.tolist())
    0.200 [1, 0]

    Args:
      rng: PRNG key from which the negatives are sampled.
      image_emb: [batch, dim] L2-normalised online image embeddings.
      text_emb: [batch, dim] L2-normalised online text embeddings of the matching captions.
      momentum_image_emb: [batch, dim] the momentum encoder's embeddings of the same images.
      momentum_text_emb: [batch, dim] the momentum encoder's embeddings of the same captions.
      image_id: [batch] integer ids; keys with the anchor's id are never its negatives.
      queue: The queue of momentum embeddings, or None for the batch's keys only.
      stats: The similarity statistics, already updated for this batch.
      matches: Known matches, which are never negatives either; or None.
      **settings: The fields of `FNESettings` by name: `margin=0.2`, `tau=0.5`,
        `elimination_tau=None` (as `tau`), `prior=1e-4`, `posterior_threshold=1e-3`,
        `min_count=200`, `monotone=False`, and `key_chunk=None`, the keys of the queue that are
        scored at a time (a multiple of 16; None for all), to save memory. `decay` and
        `elimination_decay` are deprecated names of `tau` and `elimination_tau`.

    Returns:
      The [] float32 loss, summed over both directions and divided by the batch, and a TripletAux.

    Raises:
      TypeError: on an unknown setting.
      ValueError: on a wrong shape, dtype or range.

    References:
      Li et al., Your Negative May not Be True Negative, ACM MM 2023, arXiv 2308.04380, section 3.
    """
    momentum = momentum_image_emb, momentum_text_emb
    features = Features(image_emb, text_emb, *momentum, image_id, matches=matches)
    return fne_loss(rng, features, queue, stats, FNESettings.from_keywords(settings))


def fne_triplet_loss_from_uniform(
    uniform_i2t: jax.Array,
    uniform_t2i: jax.Array,
    image_emb: jax.Array,
    text_emb: jax.Array,
    momentum_image_emb: jax.Array,
    momentum_text_emb: jax.Array,
    image_id: jax.Array,
    queue: MemoryQueue | None,
    stats: SimilarityStatistics,
    *,
    matches: Matches | None = None,
    **settings,
) -> tuple[jax.Array, TripletAux]:
    """Returns `fne_triplet_loss` of given uniform numbers, to replay a recorded run.

    >>> import jax, jax.numpy as jnp
    >>> unit = jnp.eye(3)
    >>> embeddings = unit, unit, unit, unit
    >>> low, high = jnp.full(3, 0.1), jnp.full(3, 0.9)
    >>> loss, aux = jax.jit(fne_triplet_loss_from_uniform)(
    ...     low, high, *embeddings, jnp.arange(3), None, SimilarityStatistics.create()
    ... )
    >>> aux.negative_i2t.tolist(), aux.negative_t2i.tolist()
    ([1, 0, 0], [2, 2, 1])

    Args:
      uniform_i2t: [batch] numbers in [0, 1), by which the image anchors' negatives are sampled.
      uniform_t2i: [batch] numbers in [0, 1), by which the text anchors' negatives are sampled.
      image_emb: [batch, dim] L2-normalised online image embeddings.
      text_emb: [batch, dim] L2-normalised online text embeddings of the matching captions.
      momentum_image_emb: [batch, dim] the momentum encoder's embeddings of the same images.
      momentum_text_emb: [batch, dim] the momentum encoder's embeddings of the same captions.
      image_id: [batch] integer ids; keys with the anchor's id are never its negatives.
      queue: The queue of momentum embeddings, or None for the batch's keys only.
      stats: The similarity statistics, already updated for this batch.
      matches: Known matches, which are never negatives either; or None.
      **settings: The fields of `FNESettings` by name.

    Returns:
      The [] float32 loss, summed over both directions and divided by the batch, and a TripletAux.

    Raises:
      TypeError: on an unknown setting.
      ValueError: on a wrong shape, dtype or range.
    """
    momentum = momentum_image_emb, momentum_text_emb
    features = Features(image_emb, text_emb, *momentum, image_id, matches=matches)
    settings = FNESettings.from_keywords(settings)
    return fne_loss_from_uniform((uniform_i2t, uniform_t2i), features, queue, stats, settings)


def fne_loss(
    rng: jax.Array,
    features: Features,
    queue: MemoryQueue | None,
    stats: SimilarityStatistics,
    settings: FNESettings,
) -> tuple[jax.Array, TripletAux]:
    """Returns `fne_triplet_loss` of features and settings that are structs.

    Args:
      rng: PRNG key from which the negatives are sampled.
      features: The embeddings of the batch.
      queue: The queue of momentum embeddings, or None for the batch's keys only.
      stats: The similarity statistics, already updated for this batch.
      settings: The constants of the method.

    Returns:
      The [] float32 loss, summed over both directions and divided by the batch, and a TripletAux.

    Raises:
      ValueError: on a wrong shape or dtype.
    """
    uniform_i2t, uniform_t2i = jax.random.uniform(rng, (2, jnp.shape(features.image)[0]))
    return fne_loss_from_uniform((uniform_i2t, uniform_t2i), features, queue, stats, settings)


def fne_loss_from_uniform(
    uniforms: tuple[jax.Array, jax.Array],
    features: Features,
    queue: MemoryQueue | None,
    stats: SimilarityStatistics,
    settings: FNESettings,
) -> tuple[jax.Array, TripletAux]:
    """Returns `fne_loss` of given uniform numbers.

    Args:
      uniforms: Twice [batch] numbers in [0, 1), for the image anchors and for the text anchors.
      features: The embeddings of the batch.
      queue: The queue of momentum embeddings, or None for the batch's keys only.
      stats: The similarity statistics, already updated for this batch.
      settings: The constants of the method.

    Returns:
      The [] float32 loss, summed over both directions and divided by the batch, and a TripletAux.

    Raises:
      ValueError: on a wrong shape or dtype.
    """
    check_features(features, queue)
    for name, uniform in zip(("uniform_i2t", "uniform_t2i"), uniforms, strict=True):
        checks.shape(name, uniform, jnp.shape(features.image)[:1])
    weigh = functools.partial(candidate_weight, stats=stats, settings=settings)

    def choose(uniform, direction):
        blocks = KeyBlocks.create(direction, features.image_id, queue, features.split)
        return _choose(uniform, blocks, weigh, settings)

    image_to_text, text_to_image = directions(features, queue)
    choices = choose(uniforms[0], image_to_text), choose(uniforms[1], text_to_image)
    posterior = functools.partial(
        false_negative_posterior, stats=stats, prior=settings.prior, monotone=settings.monotone
    )
    return triplet_loss_of_choices(choices, features, queue, posterior, margin=settings.margin)


def _choose(uniform: jax.Array, blocks: KeyBlocks, weigh: Weigh, settings: FNESettings) -> Choice:
    """Returns the negatives of one direction, sampled by weight or else the hardest."""
    table = blocks.table(weigh, settings.key_chunk)

    best = blocks.scores(table.best.argmax(axis=1).astype(jnp.int32), weigh)
    candidates = jnp.where(best.candidate, best.similarity, -jnp.inf)
    hardest = _pick(best.index, candidates.argmax(axis=1))
    violates = settings.margin + candidates.max(axis=1) - blocks.positive > 0
    fallback = jnp.where(violates, hardest, 0)

    block, target, _ = sample_entry(uniform, table.weight)
    inside = blocks.scores(block, weigh)
    offset, _ = first_exceeding(target, inside.weight)
    # Also false where rounding gave a block a weight that none of its keys has.
    sampled = _pick(inside.weight, offset) > 0
    # Where nothing can be sampled or violates the margin, the index may name the anchor's own
    # image: no loss there.
    chosen = jnp.where(sampled, _pick(inside.index, offset), fallback)
    return Choice(chosen, hardest, sampled, sampled | violates)


def _pick(matrix, index):
    """Returns the [batch] entries of a [batch, n] matrix at the rows' indices."""
    return jnp.take_along_axis(matrix, index[:, None], axis=1)[:, 0]

"""Triplet losses for retrieval: FNE's sampled negatives, and the hardest in the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.key_blocks import BLOCK, KeyBlocks
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.negative_sampling import candidate_weight, draw, first_exceeding
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    cosine,
    false_negative_posterior,
)


@flax.struct.dataclass
class TripletAux:
    """What a loss with chosen negatives did, for logs and reports.

    Indices point into the keys: the batch's momentum embeddings first, then the queue's slots.

    Attributes:
      negative_i2t: [batch] int32 chosen text key of each image anchor.
      negative_t2i: [batch] int32 chosen image key of each text anchor.
      hardest_i2t: [batch] int32 most similar text key of another image.
      hardest_t2i: [batch] int32 most similar image key of another image.
      fallback_fraction: [] share of the 2 * batch anchors whose weights were all 0.
      posterior: [] mean posterior of the chosen negatives.
      active_fraction: [] share of the anchors with a loss above 0.
    """

    negative_i2t: jax.Array
    negative_t2i: jax.Array
    hardest_i2t: jax.Array
    hardest_t2i: jax.Array
    fallback_fraction: jax.Array
    posterior: jax.Array
    active_fraction: jax.Array


def fne_triplet_loss(
    rng: jax.Array,
    image_emb: jax.Array,
    text_emb: jax.Array,
    momentum_image_emb: jax.Array,
    momentum_text_emb: jax.Array,
    image_id: jax.Array,
    queue: MemoryQueue | None,
    stats: SimilarityStatistics,
    **settings,
) -> tuple[jax.Array, TripletAux]:
    """Returns the triplet loss over negatives sampled by false-negative elimination.

    Gradients flow into the online embeddings through the chosen negative and the positive alone,
    so the backward pass holds no [batch, keys] matrix.

    Args:
      rng: PRNG key for the draws.
      image_emb: [batch, dim] L2-normalised online image embeddings.
      text_emb: [batch, dim] L2-normalised online text embeddings of the matching captions.
      momentum_image_emb: [batch, dim] the momentum encoder's embeddings of the same images.
      momentum_text_emb: [batch, dim] the momentum encoder's embeddings of the same captions.
      image_id: [batch] integer ids; keys with the anchor's id are never its negatives.
      queue: the memory, or None for in-batch keys only.
      stats: the similarity statistics, already updated for this batch.
      **settings: of `fne_triplet_loss_from_uniform`.

    Returns:
      The [] float32 loss, summed over both directions and divided by the batch, and a TripletAux.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      Li et al., Your Negative May not Be True Negative, ACM MM 2023, arXiv 2308.04380, section 3.
    """
    uniform_i2t, uniform_t2i = jax.random.uniform(rng, (2, jnp.shape(image_emb)[0]))
    return fne_triplet_loss_from_uniform(
        uniform_i2t,
        uniform_t2i,
        image_emb,
        text_emb,
        momentum_image_emb,
        momentum_text_emb,
        image_id,
        queue,
        stats,
        **settings,
    )


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
    margin: float = 0.2,
    decay: float = 0.5,
    elimination_decay: float | None = None,
    prior: float = 1e-4,
    posterior_threshold: float = 1e-3,
    min_count: int = 200,
    monotone: bool = False,
    key_chunk: int | None = None,
) -> tuple[jax.Array, TripletAux]:
    """`fne_triplet_loss` with its draws as arguments, to replay a recorded run.

    Args:
      uniform_i2t: [batch] numbers in [0, 1), the draws of the image anchors.
      uniform_t2i: [batch] numbers in [0, 1), the draws of the text anchors.
      image_emb: see `fne_triplet_loss`, as all up to `stats`.
      text_emb: see `fne_triplet_loss`.
      momentum_image_emb: see `fne_triplet_loss`.
      momentum_text_emb: see `fne_triplet_loss`.
      image_id: see `fne_triplet_loss`.
      queue: see `fne_triplet_loss`.
      stats: see `fne_triplet_loss`.
      margin: similarity by which the positive should win, 0.2 in the paper.
      decay: see `sampling_weights`, as all below.
      elimination_decay: see `sampling_weights`.
      prior: see `sampling_weights`.
      posterior_threshold: see `sampling_weights`.
      min_count: see `sampling_weights`.
      monotone: see `sampling_weights`.
      key_chunk: keys of the memory that are scored at a time, a multiple of 16, for a memory of
        O(batch * key_chunk) rather than O(batch * keys); None scores all at once. The draws are
        the same, up to rounding at the borders between keys.

    Returns:
      As `fne_triplet_loss`.

    Raises:
      ValueError: on a wrong shape, dtype or range.
    """
    check_features(image_emb, text_emb, momentum_image_emb, momentum_text_emb, image_id, queue)
    if key_chunk is not None and (key_chunk < BLOCK or key_chunk % BLOCK):
        raise ValueError(f"key_chunk: expected a multiple of {BLOCK} or None, got {key_chunk}")
    weigh = functools.partial(
        candidate_weight,
        stats=stats,
        margin=margin,
        decay=decay,
        elimination_decay=elimination_decay,
        prior=prior,
        posterior_threshold=posterior_threshold,
        min_count=min_count,
        monotone=monotone,
    )

    def choose(uniform, anchor, batch_keys, queue_keys):
        blocks = KeyBlocks.create(anchor, batch_keys, image_id, queue_keys, queue)
        table = blocks.table(weigh, key_chunk)

        worst = blocks.scores(table.best.argmax(axis=1).astype(jnp.int32), weigh)
        candidates = jnp.where(worst.other_image, worst.similarity, -jnp.inf)
        hardest = _pick(worst.index, candidates.argmax(axis=1))
        violates = margin + candidates.max(axis=1) - blocks.positive > 0
        fallback = jnp.where(violates, hardest, 0)

        block, target, _ = draw(uniform, table.weight)
        drawn = blocks.scores(block, weigh)
        offset, _ = first_exceeding(target, drawn.weight)
        # Also false where rounding gave a block weight that none of its keys has.
        sampled = _pick(drawn.weight, offset) > 0
        # Where nothing can be sampled or violates the margin, the index may name the anchor's own
        # image: no loss there.
        chosen = jnp.where(sampled, _pick(drawn.index, offset), fallback)
        return Choice(chosen, hardest, sampled, sampled | violates)

    queue_text = None if queue is None else queue.text
    queue_image = None if queue is None else queue.image
    return triplet_loss_of_choices(
        choose(uniform_i2t, image_emb, momentum_text_emb, queue_text),
        choose(uniform_t2i, text_emb, momentum_image_emb, queue_image),
        image_emb,
        text_emb,
        momentum_image_emb,
        momentum_text_emb,
        queue,
        functools.partial(false_negative_posterior, stats=stats, prior=prior, monotone=monotone),
        margin=margin,
    )


@flax.struct.dataclass
class Choice:
    """The negatives of one direction.

    Attributes:
      index: [batch] int32 into the keys.
      hardest: [batch] int32, the most similar key of another image.
      sampled: [batch] bool, false where the strategy had nothing to choose from.
      counts: [batch] bool, false where the index names no negative: no loss there.
    """

    index: jax.Array
    hardest: jax.Array
    sampled: jax.Array
    counts: jax.Array


def triplet_loss_of_choices(
    i2t: Choice,
    t2i: Choice,
    image_emb: jax.Array,
    text_emb: jax.Array,
    momentum_image_emb: jax.Array,
    momentum_text_emb: jax.Array,
    queue: MemoryQueue | None,
    posterior: Callable[[jax.Array], jax.Array],
    *,
    margin: float,
) -> tuple[jax.Array, TripletAux]:
    """Returns the triplet loss over chosen momentum keys, and what it did.

    Args:
      i2t: choices of the image anchors among the text keys.
      t2i: choices of the text anchors among the image keys.
      image_emb: see `fne_triplet_loss`, as all up to `queue`.
      text_emb: see `fne_triplet_loss`.
      momentum_image_emb: see `fne_triplet_loss`.
      momentum_text_emb: see `fne_triplet_loss`.
      queue: see `fne_triplet_loss`.
      posterior: of similarities, for the log.
      margin: similarity by which the positive should win.
    """

    def direction(choice, anchor, batch_keys, queue_keys):
        positive = rowwise_cosine(anchor, batch_keys)
        negative = rowwise_cosine(anchor, take_keys(choice.index, batch_keys, queue_keys))
        hinge = jnp.where(choice.counts, jax.nn.relu(margin + negative - positive), 0.0)
        return hinge, jax.lax.stop_gradient(negative)

    queue_text = None if queue is None else queue.text
    queue_image = None if queue is None else queue.image
    hinge_i2t, negative_i2t = direction(i2t, image_emb, momentum_text_emb, queue_text)
    hinge_t2i, negative_t2i = direction(t2i, text_emb, momentum_image_emb, queue_image)
    # Stacked rather than joined: rows that are split over devices then stay where they are.
    hinge = jnp.stack([hinge_i2t, hinge_t2i])
    aux = TripletAux(
        negative_i2t=i2t.index,
        negative_t2i=t2i.index,
        hardest_i2t=i2t.hardest,
        hardest_t2i=t2i.hardest,
        fallback_fraction=1 - jnp.stack([i2t.sampled, t2i.sampled]).mean(),
        posterior=posterior(jnp.stack([negative_i2t, negative_t2i])).mean(),
        active_fraction=(hinge > 0).mean(),
    )
    return hinge.sum() / image_emb.shape[0], aux


def hardest_negative_triplet_loss(
    image_emb: jax.Array,
    text_emb: jax.Array,
    *,
    margin: float = 0.2,
    same_image: jax.Array | None = None,
) -> jax.Array:
    """Returns the in-batch triplet loss with the hardest negative, FNE's warm-up.

    Args:
      image_emb: [batch, dim] L2-normalised image embeddings.
      text_emb: [batch, dim] L2-normalised embeddings of the matching captions.
      margin: similarity by which the positive should win, 0.2 in the paper.
      same_image: [batch, batch] bool, true where two pairs show one image: no negatives there.
        None leaves only the diagonal out, as the authors do.

    Returns:
      The [] float32 loss, summed over both directions and divided by the batch.

    Raises:
      ValueError: on a wrong shape, dtype or a negative margin.

    References:
      Faghri et al., VSE++, BMVC 2018, arXiv 1707.05612, equation 6.
    """
    batch, _ = checks.embeddings(image_emb=image_emb, text_emb=text_emb)
    checks.in_range("margin", margin, 0)
    own = jnp.eye(batch, dtype=bool)
    same_image = own if same_image is None else same_image
    checks.shape("same_image", same_image, (batch, batch))
    similarity = cosine(image_emb, text_emb)
    positive = jnp.diagonal(similarity)

    def worst_hinge(anchor_axis):
        gap = margin + similarity - jnp.expand_dims(positive, 1 - anchor_axis)
        return jnp.where(same_image | own, 0.0, jax.nn.relu(gap)).max(axis=1 - anchor_axis)

    return (worst_hinge(0) + worst_hinge(1)).sum() / batch


def rowwise_cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the [batch] float32 products of matching rows; `b` gets no gradient."""
    return (a.astype(jnp.float32) * jax.lax.stop_gradient(b).astype(jnp.float32)).sum(axis=-1)


def take_keys(index: jax.Array, batch_keys: jax.Array, queue_keys: jax.Array | None) -> jax.Array:
    """Returns the [batch, dim] keys that indices into (batch keys, queue slots) name."""
    batch = batch_keys.shape[0]
    rows = jnp.asarray(batch_keys)[jnp.minimum(index, batch - 1)]
    if queue_keys is None:
        return rows
    slots = jnp.asarray(queue_keys)[jnp.maximum(index - batch, 0)]
    return jnp.where((index < batch)[:, None], rows, slots)


def _pick(matrix, index):
    return jnp.take_along_axis(matrix, index[:, None], axis=1)[:, 0]


def check_features(
    image_emb: jax.Array,
    text_emb: jax.Array,
    momentum_image_emb: jax.Array,
    momentum_text_emb: jax.Array,
    image_id: jax.Array,
    queue: MemoryQueue | None,
) -> None:
    """Raises ValueError unless the arguments of `fne_triplet_loss` fit together."""
    batch, dim = checks.embeddings(
        image_emb=image_emb,
        text_emb=text_emb,
        momentum_image_emb=momentum_image_emb,
        momentum_text_emb=momentum_text_emb,
    )
    checks.ids("image_id", image_id, batch)
    if queue is not None:
        checks.shape("queue.image", queue.image, (queue.size, dim))
        checks.shape("queue.text", queue.text, (queue.size, dim))
        checks.ids("queue.image_id", queue.image_id, queue.size)

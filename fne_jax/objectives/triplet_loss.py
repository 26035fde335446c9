"""The triplet loss over chosen negatives, and the one over the hardest in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.features import Direction, Features, check_features, directions
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.similarity_statistics import SimilarityStatistics, cosine


@flax.struct.dataclass
class Choice:
    """The negatives chosen in one direction.

    Attributes:
      index: [batch] int32 indices into the keys: the batch's first, then the queue's slots.
      hardest: [batch] int32 indices of the most similar candidates, -1 where there is none.
      sampled: [batch] bool, false where the strategy had nothing to choose from.
      counts: [batch] bool, false where the index names no negative, so that there is no loss.
    """

    index: jax.Array
    hardest: jax.Array
    sampled: jax.Array
    counts: jax.Array


@flax.struct.dataclass
class TripletAux:
    """What a loss with chosen negatives did, for logs and reports.

    Indices point into the keys: the batch's momentum embeddings first, then the queue's slots.

    Attributes:
      negative_i2t: [batch] int32, the text key chosen for each image anchor, of those that count.
      negative_t2i: [batch] int32, the image key chosen for each text anchor likewise.
      counts_i2t: [batch] bool, false for an image anchor that has no negative, and so no loss.
      counts_t2i: [batch] bool, the same of text anchors.
      hardest_i2t: [batch] int32, the most similar text key that may be a negative: of another
        image, not known to match, and not eliminated; -1 where there is none.
      hardest_t2i: [batch] int32, the most similar image key likewise.
      fallback_fraction: [] share of the 2 * batch anchors for which nothing could be sampled.
      posterior: [] mean posterior of the chosen negatives being false ones, over the anchors that
        count; NaN where none does.
      active_fraction: [] share of the 2 * batch anchors with a loss above 0.
    """

    negative_i2t: jax.Array
    negative_t2i: jax.Array
    counts_i2t: jax.Array
    counts_t2i: jax.Array
    hardest_i2t: jax.Array
    hardest_t2i: jax.Array
    fallback_fraction: jax.Array
    posterior: jax.Array
    active_fraction: jax.Array


def triplet_loss_of_choices(
    choose: Callable[[jax.Array, Direction], Choice],
    random: Sequence[jax.Array] | jax.Array,
    features: Features,
    queue: MemoryQueue | None,
    posterior: Callable[[jax.Array], jax.Array],
    *,
    margin: float,
) -> tuple[jax.Array, TripletAux]:
    """Returns the triplet loss over chosen momentum keys, and what it did.

    Gradients flow into the online embeddings through the chosen negative and the positive alone, so
    the backward pass holds no [batch, keys] matrix.

    Args:
      choose: Returns the negatives of one direction, of what it needs to sample.
      random: What the choices of either direction need to sample, such as two PRNG keys.
      features: The embeddings of the batch.
      queue: The queue of momentum embeddings, or None for the batch's keys only.
      posterior: Maps similarities to the posterior that is logged, unless the features have one.
      margin: Similarity by which the positive should win.

    Returns the [] float32 loss, summed over both directions and divided by the batch.
    """
    image_to_text, text_to_image = directions(features, queue)
    i2t, t2i = choose(random[0], image_to_text), choose(random[1], text_to_image)
    hinge_i2t, negative_i2t = _hinge(image_to_text, i2t, margin)
    hinge_t2i, negative_t2i = _hinge(text_to_image, t2i, margin)
    # Stacked rather than joined: rows that are split over devices then stay where they are.
    hinge, counts = jnp.stack([hinge_i2t, hinge_t2i]), jnp.stack([i2t.counts, t2i.counts])
    listed_i2t = image_to_text.probability(i2t.index)
    listed_t2i = text_to_image.probability(t2i.index)
    if listed_i2t is None or listed_t2i is None:
        probability = posterior(jnp.stack([negative_i2t, negative_t2i]))
    else:
        probability = jnp.stack([listed_i2t, listed_t2i])
    aux = TripletAux(
        negative_i2t=i2t.index,
        negative_t2i=t2i.index,
        counts_i2t=i2t.counts,
        counts_t2i=t2i.counts,
        hardest_i2t=i2t.hardest,
        hardest_t2i=t2i.hardest,
        fallback_fraction=1 - jnp.stack([i2t.sampled, t2i.sampled]).mean(),
        posterior=probability.mean(where=counts),
        active_fraction=(hinge > 0).mean(),
    )
    return hinge.sum() / features.image.shape[0], aux


def _hinge(direction: Direction, choice: Choice, margin: float) -> tuple[jax.Array, jax.Array]:
    """Returns each anchor's loss and its similarity to the negative (without gradient), [batch]."""
    anchor, batch_keys = direction.anchor, direction.batch_keys
    positive = rowwise_cosine(anchor, batch_keys)
    negative = rowwise_cosine(anchor, take_keys(choice.index, batch_keys, direction.queue_keys))
    hinge = jnp.where(choice.counts, jax.nn.relu(margin + negative - positive), 0.0)
    return hinge, jax.lax.stop_gradient(negative)


def hardest_negative_triplet_loss(
    features: Features,
    queue: MemoryQueue | None = None,
    stats: SimilarityStatistics | None = None,
    rng: jax.Array | None = None,
    *,
    margin: float = 0.2,
) -> tuple[jax.Array, None]:
    """Returns the in-batch triplet loss with the hardest negative, FNE's warm-up.

    >>> import jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> loss, _ = hardest_negative_triplet_loss(Features(image_emb, text_emb), margin=0.3)
    >>> print(f"{loss:.3f}")
    0.200

    Args:
      features: The embeddings of the batch.
      margin: Similarity by which the positive should win, at least 0; 0.2 in the paper.

    Returns:
      The [] float32 loss, summed over both directions and divided by the batch, and None.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      Faghri et al., VSE++, BMVC 2018, arXiv 1707.05612, equation 6.
    """
    del queue, stats, rng
    check_features(features)
    checks.in_range("margin", margin, 0)
    similarity = cosine(features.image, features.text)
    positive = jnp.diagonal(similarity)

    def worst_hinge(anchor_axis):
        gap = margin + similarity - jnp.expand_dims(positive, 1 - anchor_axis)
        return jnp.where(features.excluded, 0.0, jax.nn.relu(gap)).max(axis=1 - anchor_axis)

    return (worst_hinge(0) + worst_hinge(1)).sum() / len(features.image), None


def rowwise_cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the [batch] float32 products of the matching rows of two [batch, dim] arrays.

    No gradient flows into `b`.
    """
    return (a.astype(jnp.float32) * jax.lax.stop_gradient(b).astype(jnp.float32)).sum(axis=-1)


def take_keys(index: jax.Array, batch_keys: jax.Array, queue_keys: jax.Array | None) -> jax.Array:
    """Returns the [batch, dim] float32 keys at [batch] indices: the batch's, then the queue's."""
    batch = batch_keys.shape[0]
    rows = jnp.asarray(batch_keys)[jnp.minimum(index, batch - 1)].astype(jnp.float32)
    if queue_keys is None:
        return rows
    slots = jnp.asarray(queue_keys)[jnp.maximum(index - batch, 0)].astype(jnp.float32)
    return jnp.where((index < batch)[:, None], rows, slots)

"""The embeddings of a batch, and the keys that either direction of retrieval compares them with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.struct
import jax

from fne_jax.objectives import checks
from fne_jax.objectives.memory_queue import EMPTY_ID, MemoryQueue


@flax.struct.dataclass
class Matches:
    """Which images and captions of a step are known to match, labelled or not.

    `fne_jax.objectives.known_matches` looks them up. Objectives leave them out wherever they would
    be negatives; own pairs stay what they are.

    >>> import jax.numpy as jnp
    >>> from fne_jax.objectives.contrastive import infonce_loss
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])
    >>> embeddings = image_emb, text_emb, image_emb, text_emb
    >>> # The caption of pair 1 also matches the image of pair 0, which have no negative then.
    >>> matches = Matches(batch=jnp.array([[True, True], [False, True]]))
    >>> for known in (None, matches):
    ...     loss = infonce_loss(*embeddings, jnp.arange(2), None, temperature=0.1, matches=known)
    ...     print(f"{loss:.3f}")
    0.127
    0.063

    Attributes:
      batch: [batch, batch] bool, true where the image of pair i (row) matches the caption of pair
        j (column).
      queue_text: [batch, size] bool, true where the image of pair i matches the caption in a slot
        of the queue; None without a queue.
      queue_image: [batch, size] bool, true where the caption of pair i matches the image in a slot
        of the queue; None without a queue.
    """

    batch: jax.Array
    queue_text: jax.Array | None = None
    queue_image: jax.Array | None = None


def _as_it_is(array):
    return array


@dataclasses.dataclass(frozen=True)
class RowSplit:
    """How devices share the rows of an array.

    Attributes:
      devices: How many they are.
      rows: Returns an array of which each device holds its part of the rows, which must divide.
    """

    devices: int = 1
    rows: Callable[[jax.Array], jax.Array] = _as_it_is


# One device has all rows.
NOT_SPLIT = RowSplit()


@flax.struct.dataclass
class Features:
    """The embeddings of a batch of matching pairs, L2-normalised; row i of each is pair i.

    Attributes:
      image: [batch, dim] online image embeddings.
      text: [batch, dim] online text embeddings of the matching captions.
      momentum_image: [batch, dim] the momentum encoder's embeddings of the same images. Train steps
        leave both out for objectives that use no keys, as the registry says.
      momentum_text: [batch, dim] the momentum encoder's embeddings of the same captions.
      image_id: [batch] integer ids of the images.
      same_image: [batch, batch] bool, true where two pairs count as one image in losses and
        statistics within the batch; None leaves only the diagonal out.
      matches: Known matches, or None where none are known.
      learned: What an objective learns beside the encoders, as `learned_scalars.initial` begins
        it; None where all its numbers are fixed.
      split: The devices that share the scoring of the queue, though each holds all of it.
    """

    image: jax.Array
    text: jax.Array
    momentum_image: jax.Array
    momentum_text: jax.Array
    image_id: jax.Array
    same_image: jax.Array | None = None
    matches: Matches | None = None
    learned: Mapping[str, jax.Array] | None = None
    split: RowSplit = flax.struct.field(pytree_node=False, default=NOT_SPLIT)

    @property
    def excluded(self) -> jax.Array | None:
        """[batch, batch] bool, true for images (rows) and captions that are no negatives.

        None where nothing but the diagonal is left out.
        """
        if self.matches is None:
            return self.same_image
        if self.same_image is None:
            return self.matches.batch
        return self.same_image | self.matches.batch


class Direction(NamedTuple):
    """One direction of retrieval: what asks, and the keys that may answer.

    Attributes:
      anchor: [batch, dim] online embeddings of one modality.
      batch_keys: [batch, dim] momentum embeddings of the other; key i matches anchor i.
      queue_keys: [size, dim] the queue's embeddings of the other, or None without a queue.
      batch_matches: [batch, batch] bool, true where an anchor (row) is known to match a key of the
        batch; None where nothing is known.
      queue_matches: [batch, size] bool, the same of the queue's keys, or None.
    """

    anchor: jax.Array
    batch_keys: jax.Array
    queue_keys: jax.Array | None
    batch_matches: jax.Array | None = None
    queue_matches: jax.Array | None = None


def directions(features: Features, queue: MemoryQueue | None) -> tuple[Direction, Direction]:
    """Returns the two directions: images that ask among texts, and texts among images."""
    image_to_text = Direction(
        features.image, features.momentum_text, None if queue is None else queue.text
    )
    text_to_image = Direction(
        features.text, features.momentum_image, None if queue is None else queue.image
    )
    matches = features.matches
    if matches is None:
        return image_to_text, text_to_image
    return (
        image_to_text._replace(batch_matches=matches.batch, queue_matches=matches.queue_text),
        text_to_image._replace(batch_matches=matches.batch.T, queue_matches=matches.queue_image),
    )


def excluded_keys(
    direction: Direction, image_id: jax.Array, queue: MemoryQueue | None
) -> tuple[jax.Array, jax.Array | None]:
    """Returns which keys are no negatives of an anchor: its image's, and its known matches.

    Args:
      direction: The anchors and their keys.
      image_id: [batch] integer image ids of the anchors.
      queue: The queue of the direction's keys, or None for the batch's alone.

    Returns:
      [batch, batch] bool, own matches included; and [batch, size] bool, empty slots included, or
      None without a queue.
    """
    in_batch = image_id[:, None] == image_id[None, :]
    if direction.batch_matches is not None:
        in_batch = in_batch | direction.batch_matches
    if queue is None:
        return in_batch, None
    in_queue = image_id[:, None] == queue.image_id[None, :]
    in_queue = in_queue | (queue.image_id == EMPTY_ID)[None, :]
    if direction.queue_matches is not None:
        in_queue = in_queue | direction.queue_matches
    return in_batch, in_queue


def check_features(features: Features, queue: MemoryQueue | None) -> None:
    """Raises ValueError unless embeddings, ids and queue fit together.

    The messages name the arguments as `fne_triplet_loss` does (`image_emb`, ...).
    """
    batch, dim = checks.embeddings(
        image_emb=features.image,
        text_emb=features.text,
        momentum_image_emb=features.momentum_image,
        momentum_text_emb=features.momentum_text,
    )
    checks.ids("image_id", features.image_id, batch)
    if queue is not None:
        checks.shape("queue.image", queue.image, (queue.size, dim))
        checks.shape("queue.text", queue.text, (queue.size, dim))
        checks.ids("queue.image_id", queue.image_id, queue.size)
    if features.matches is not None:
        check_matches(features.matches, batch, queue)


def check_matches(matches: Matches, batch: int, queue: MemoryQueue | None) -> None:
    """Raises ValueError unless known matches fit the batch and the queue."""
    checks.shape("matches.batch", matches.batch, (batch, batch))
    if queue is None:
        return
    for name in ("queue_text", "queue_image"):
        mask = getattr(matches, name)
        if mask is None:
            raise ValueError(f"matches.{name}: expected [batch, size] bool, as there is a queue")
        checks.shape(f"matches.{name}", mask, (batch, queue.size))

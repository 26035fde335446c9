"""The embeddings of a batch, and the keys that either direction of retrieval compares them with."""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax

from fne_jax.objectives import checks
from fne_jax.objectives.memory_queue import MemoryQueue


@flax.struct.dataclass
class Features:
    """The embeddings of a batch of matching pairs, L2-normalised; row i of each is pair i.

    Attributes:
      image: [batch, dim] online image embeddings.
      text: [batch, dim] online text embeddings of the matching captions.
      momentum_image: [batch, dim] the momentum encoder's embeddings of the same images.
      momentum_text: [batch, dim] the momentum encoder's embeddings of the same captions.
      image_id: [batch] integer ids of the images.
      same_image: [batch, batch] bool, true where two pairs count as one image in losses and
        statistics within the batch; None leaves only the diagonal out.
    """

    image: jax.Array
    text: jax.Array
    momentum_image: jax.Array
    momentum_text: jax.Array
    image_id: jax.Array
    same_image: jax.Array | None = None


class Direction(NamedTuple):
    """One direction of retrieval: what asks, and the keys that may answer.

    Attributes:
      anchor: [batch, dim] online embeddings of one modality.
      batch_keys: [batch, dim] momentum embeddings of the other; key i matches anchor i.
      queue_keys: [size, dim] the queue's embeddings of the other, or None without a queue.
    """

    anchor: jax.Array
    batch_keys: jax.Array
    queue_keys: jax.Array | None


def directions(features: Features, queue: MemoryQueue | None) -> tuple[Direction, Direction]:
    """Returns the two directions: images that ask among texts, and texts among images."""
    return (
        Direction(features.image, features.momentum_text, None if queue is None else queue.text),
        Direction(features.text, features.momentum_image, None if queue is None else queue.image),
    )


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

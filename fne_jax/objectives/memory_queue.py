"""The queue of momentum embeddings: a ring buffer of recent batches (MoCo, arXiv 1911.05722)."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from fne_jax.objectives import checks

EMPTY_ID = -1


@flax.struct.dataclass
class MemoryQueue:
    """Momentum embeddings of the last pairs, both modalities of a pair in one slot.

    >>> import jax, jax.numpy as jnp
    >>> queue = MemoryQueue.create(jax.random.key(0), size=5, dim=2)
    >>> rows = jnp.eye(3, 2)
    >>> queue = queue.enqueue(rows, rows, image_id=jnp.array([7, 8, 9]))
    >>> queue = queue.enqueue(rows, rows, image_id=jnp.array([10, 11, 12]))  # wraps around
    >>> queue.image_id.tolist(), int(queue.pointer)
    ([12, 8, 9, 10, 11], 1)

    Attributes:
      image: [size, dim] float32 L2-normalised momentum image embeddings.
      text: [size, dim] float32 L2-normalised momentum text embeddings.
      image_id: [size] int32 image id of each slot's pair; -1 where the slot is empty.
      pair_id: [size] int32 id of the (image, caption) pair in each slot, by which a sampled
        negative can be named afterwards; -1 where the slot is empty or the id was not given.
      pointer: [] int32, the slot that is written next.
    """

    image: jax.Array
    text: jax.Array
    image_id: jax.Array
    pair_id: jax.Array
    pointer: jax.Array

    @classmethod
    def create(cls, rng: jax.Array, size: int, dim: int) -> MemoryQueue:
        """Returns an empty queue, whose slots hold random unit vectors under the id -1.

        Args:
          rng: PRNG key for the random vectors.
          size: number of slots; it need not be a multiple of the batch.
          dim: embedding dimension.

        Raises:
          ValueError: if size or dim is below 1.
        """
        checks.in_range("size", size, 1)
        checks.in_range("dim", dim, 1)
        vectors = jax.random.normal(rng, (2, size, dim), jnp.float32)
        vectors /= jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        return cls(
            image=vectors[0],
            text=vectors[1],
            image_id=jnp.full((size,), EMPTY_ID, jnp.int32),
            pair_id=jnp.full((size,), EMPTY_ID, jnp.int32),
            pointer=jnp.zeros((), jnp.int32),
        )

    @property
    def size(self) -> int:
        """Number of slots."""
        return self.image.shape[0]

    def enqueue(
        self,
        image_emb: jax.Array,
        text_emb: jax.Array,
        image_id: jax.Array,
        pair_id: jax.Array | None = None,
        where: jax.Array | bool = True,
    ) -> MemoryQueue:
        """Returns the queue with a batch written at the pointer, over the oldest slots.

        A batch that runs past the end wraps around. No gradient enters the queue.

        Args:
          image_emb: [batch, dim] momentum image embeddings.
          text_emb: [batch, dim] momentum text embeddings.
          image_id: [batch] non-negative integer image ids.
          pair_id: [batch] integer pair ids, for callers that name their negatives; or None.
          where: [] bool; where it is False, the queue stays as it is.

        Raises:
          ValueError: on a wrong shape or dtype, or a batch larger than the queue.
        """
        batch, dim = checks.embeddings(image_emb=image_emb, text_emb=text_emb)
        checks.ids("image_id", image_id, batch)
        if dim != self.image.shape[1]:
            raise ValueError(f"image_emb: expected dim {self.image.shape[1]}, got {dim}")
        if batch > self.size:
            raise ValueError(f"image_emb: expected at most {self.size} rows, got {batch}")
        if pair_id is None:
            pair_id = jnp.full((batch,), EMPTY_ID, jnp.int32)
        checks.ids("pair_id", pair_id, batch)
        slots = (self.pointer + jnp.arange(batch, dtype=jnp.int32)) % self.size

        def write(buffer, rows):
            rows = jax.lax.stop_gradient(rows).astype(buffer.dtype)
            # Chosen among the rows written: among entire buffers it would move all of the queue.
            rows = jnp.where(where, rows, buffer[slots])
            return buffer.at[slots].set(rows, unique_indices=True)

        return MemoryQueue(
            image=write(self.image, image_emb),
            text=write(self.text, text_emb),
            image_id=write(self.image_id, image_id),
            pair_id=write(self.pair_id, pair_id),
            pointer=jnp.where(where, self.pointer + batch, self.pointer) % self.size,
        )

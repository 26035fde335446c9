"""Candidates in blocks: what sampling needs to know of many keys, without a [batch, keys] matrix.

The scores of all keys are reduced to one number for each block of 16 keys; a block is then chosen
by these, and only its own keys are scored again. So nothing larger than a chunk of the scores is
ever held, the keys of the batch and of the queue are never joined, and no long row is summed
element by element.

Where several devices share the queue's keys, each scores its part of them for all anchors, and the
table, which is small, is then handed to the anchors' devices: so no device reads all of the queue.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fne_jax.objectives.features import Direction, RowSplit, apart
from fne_jax.objectives.similarity_statistics import cosine

# Keys in a block: their gathered embeddings, [batch, BLOCK, dim], and the table of blocks,
# [batch, keys / BLOCK], are both far smaller than the scores.
BLOCK = 16

# Maps similarities, each anchor's positive similarity, which keys are no negatives (of the anchor's
# image, or known to match), and how likely others match where a list tells (else None) to weights,
# and to which keys may be negatives at all; the arguments broadcast against each other.
Weigh = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


class KeyBlocks:
    """The candidates of one direction, the batch's keys, then the queue's; none has a gradient.

    Args:
      direction: The direction.
      split: The devices that share the queue's keys.
      weigh: Maps similarities to weights and candidates.

    Attributes:
      positive: [batch] similarity of each anchor to its own match.
    """

    def __init__(self, direction: Direction, split: RowSplit, weigh: Weigh):
        self._weigh, self._split = weigh, split
        self._anchor, batch_keys = jax.lax.stop_gradient((direction.anchor, direction.batch_keys))
        self._image_id = jnp.asarray(direction.image_id)
        # Of the batch's keys (rows) to the anchors (columns), as is what is known of them.
        self._batch_similarity = cosine(batch_keys, self._anchor)
        self.positive = jnp.diagonal(self._batch_similarity)
        self._batch_matches, in_queue = (
            None if matches is None else jnp.asarray(matches).T
            for matches in (direction.batch_matches, direction.queue_matches)
        )
        # The queue's keys, [size, dim], their image ids, and what is known of them, [size, batch].
        self._slots = None
        if direction.queue_keys is not None:
            keys, ids = direction.queue_keys, direction.queue_id
            self._slots = jnp.asarray(keys), jnp.asarray(ids), in_queue

    def table(self, key_chunk: int | None) -> tuple[jax.Array, jax.Array]:
        """Returns what is kept of each block of keys, `key_chunk` of the queue's scored at a time.

        That is [batch, blocks] sums of the weights, and [batch, blocks] highest similarities to a
        candidate, -inf where there is none.
        """
        parts = [self._reduce(self._batch_similarity, self._image_id, self._batch_matches)]
        if self._slots is not None:
            parts += self._scan_queue(self._slots, key_chunk)
        weight, best = (jnp.concatenate(part, axis=0).T for part in zip(*parts, strict=True))
        if self._anchor.shape[0] % self._split.devices == 0:
            weight, best = self._split.rows(weight), self._split.rows(best)
        return weight, best

    def scores(self, block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns the keys of one block for each anchor, of [batch] int32 numbers of blocks.

        That is [batch, BLOCK] int32 indices into the keys, the batch's first, then the queue's
        slots; their float32 similarities to the anchor, and weights, 0 beyond the last key; and
        bool, true for existing keys that may be negatives.
        """
        batch = self._anchor.shape[0]
        batch_blocks = -(-batch // BLOCK)
        column = jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
        index = block[:, None] * BLOCK + column
        exists = index < batch
        row = jnp.minimum(index, batch - 1)
        similarity = self._batch_similarity[row, jnp.arange(batch)[:, None]]
        same, known = self._image_id[row] == self._image_id[:, None], None
        if self._batch_matches is not None:
            known = _of_anchors(self._batch_matches, row)
        if self._slots is not None:
            keys, key_id, matches = self._slots
            size = len(keys)
            slot = (block[:, None] - batch_blocks) * BLOCK + column
            in_queue = (block >= batch_blocks)[:, None]
            row = jnp.clip(slot, 0, size - 1)
            from_queue = jnp.einsum(
                "bd,bnd->bn",
                self._anchor.astype(jnp.float32),
                keys[row].astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            similarity = jnp.where(in_queue, from_queue, similarity)
            same = jnp.where(in_queue, key_id[row] == self._image_id[:, None], same)
            if matches is not None and known is not None:
                known = jnp.where(in_queue, _of_anchors(matches, row), known)
            exists = jnp.where(in_queue, slot < size, exists)
            index = jnp.where(in_queue, batch + slot, index)
        weight, candidate = self._weigh(similarity, self.positive[:, None], *apart(same, known))
        return index, similarity, jnp.where(exists, weight, 0.0), exists & candidate

    def _reduce(self, similarity, key_id, matches):
        """Returns the weights and best similarities, [blocks, batch], of [keys, batch] scores."""
        same = key_id[:, None] == self._image_id[None, :]
        weight, candidate = self._weigh(similarity, self.positive[None, :], *apart(same, matches))
        others = jnp.where(candidate, similarity, -jnp.inf)
        return _by_block(weight, jnp.sum), _by_block(others, jnp.max)

    def _scan_queue(self, slots, key_chunk):
        size, batch = len(slots[0]), len(self._anchor)
        chunk = size if key_chunk is None else min(key_chunk, size)

        def table_of(slots):
            keys, key_id, matches = slots
            # What is known of matches lies with the anchors, and would have to move.
            if matches is not None or len(keys) % (self._split.devices * BLOCK):
                return self._reduce(cosine(keys, self._anchor), key_id, matches)
            rows = self._split.rows
            similarity = rows(cosine(rows(keys), self._anchor))
            weight, best = self._reduce(similarity, rows(key_id), None)
            return rows(weight), rows(best)

        def step(_, start):
            take = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=chunk
            )
            # Without known matches there is None among them, which is an empty tree.
            return None, table_of(jax.tree.map(take, slots))

        chunked = size - size % chunk
        if chunked == chunk:  # fewer than two chunks: no loop
            return [table_of(slots)]
        _, tables = jax.lax.scan(step, None, jnp.arange(0, chunked, chunk))
        parts = [tuple(table.reshape(-1, batch) for table in tables)]
        if chunked < size:
            parts.append(table_of(jax.tree.map(lambda slot: slot[chunked:], slots)))
        return parts


def _of_anchors(matches, row):
    """Returns [batch, BLOCK] of [keys, batch] at each anchor's rows, [batch, BLOCK].

    Indexing with the anchors' numbers gives the same, but would gather the rows of all devices.
    """
    return jnp.take_along_axis(matches.T, row, axis=1)


def _by_block(matrix, reduce):
    """Reduces each BLOCK rows of [keys, batch] to one; the last block may be shorter."""
    keys, batch = matrix.shape
    filled = keys - keys % BLOCK
    reduced = reduce(matrix[:filled].reshape(-1, BLOCK, batch), axis=1)
    if filled == keys:
        return reduced
    return jnp.concatenate([reduced, reduce(matrix[filled:], axis=0, keepdims=True)])

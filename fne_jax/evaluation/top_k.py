"""The most similar items of each query, exactly, without ever holding all similarities.

All that ranks, lists or searches embeddings in memory goes by blocks of queries through here, but
for `ranks`, which needs each similarity for both directions and so walks over tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.objectives.similarity_statistics import cosine

# Rows whose similarities to everything are held at once.
BLOCK_ROWS = 256


def by_blocks(rows: int, compute: Callable[[slice], Any]) -> Any:
    """Returns what a function computes of each block of rows, joined along the first axis.

    `compute` takes the slice of a block's rows, and returns an array of as many rows or a pytree of
    such arrays.

    Returns:
      The arrays on the host, in the function's structure, each [rows, ...].
    """
    blocks = [
        jax.device_get(compute(slice(start, min(start + BLOCK_ROWS, rows))))
        for start in range(0, rows, BLOCK_ROWS)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)


def top_k(
    queries: np.ndarray,
    items: np.ndarray | jax.Array,
    count: int,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the most similar items of each query, all or those of other groups.

    Args:
      queries: [queries, dim] L2-normalised embeddings.
      items: [items, dim] L2-normalised embeddings; on the device they are not copied again.
      count: How many items of each query; all where there are fewer.
      groups: [queries] int and [items] int groups; items of a query's own group, such as those of
        its own image, are left out. None to leave out nothing.

    Returns:
      [queries, count] int32 rows of the items, the most similar first and the lower row first among
      equals; and their [queries, count] float32 similarities, which are -inf where nothing but the
      query's own group is left.
    """
    count = min(count, len(items))
    query_group, item_group = (None, None) if groups is None else groups
    items, item_group = jax.device_put((items, item_group))

    def of(part: slice):
        own = None if query_group is None else query_group[part]
        return _top(queries[part], items, own, item_group, count)

    similarity, rows = by_blocks(len(queries), of)
    return rows, similarity


@functools.partial(jax.jit, static_argnames="count")
def _top(queries, items, query_group, item_group, count):
    # + 0 turns -0 into 0, which `top_k` would not count as its equal.
    similarity = cosine(queries, items) + 0.0
    if query_group is not None:
        own = query_group[:, None] == item_group[None, :]
        similarity = jnp.where(own, -jnp.inf, similarity)
    return tuple(jax.lax.top_k(similarity, count))


def first_hits(
    queries: np.ndarray, items: jax.Array, relevant: np.ndarray, count: int
) -> np.ndarray:
    """Returns which of the first items match, for a block of queries.

    Among equally similar items those that do not match come first.

    Args:
      queries: [queries, dim] L2-normalised embeddings.
      items: [items, dim] L2-normalised embeddings.
      relevant: [queries, items] bool, true where an item matches.
      count: How many items of each query; all where there are fewer.

    Returns:
      [queries, count] bool, from the most similar item on.
    """
    count = min(count, len(items))
    similarity, hits, tied_misses = jax.device_get(_first_items(queries, items, relevant, count))
    hits = np.take_along_axis(hits, np.lexsort((hits, -similarity), axis=1), axis=1)
    # The list may end among equals: then those that do not match are the ones in it.
    tied = similarity == similarity[:, -1:]
    return np.where(tied, np.cumsum(tied, axis=1) > tied_misses[:, None], hits)


@functools.partial(jax.jit, static_argnames="count")
def _first_items(queries, items, relevant, count):
    """Returns the first items' similarities and whether they match, both [queries, count].

    And how many items, in the list or not, are as similar as its last one and do not match.
    """
    similarity = cosine(queries, items) + 0.0
    # Without the barrier XLA sees that only a slice of `first` is used below, and sorts whole rows.
    first, rows = jax.lax.optimization_barrier(jax.lax.top_k(similarity, count))
    tied_misses = (~relevant & (similarity == first[:, -1:])).sum(axis=1, dtype=jnp.int32)
    return first, jnp.take_along_axis(relevant, rows, axis=1), tied_misses

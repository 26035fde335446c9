"""The first items of each query, in an order that equal similarities cannot blur."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.evaluation.blocks import by_blocks
from fne_jax.objectives.similarity_statistics import cosine


@dataclasses.dataclass(frozen=True)
class Matches:
    """What is true of each query, labelled or not.

    Attributes:
      rows: [queries] integer arrays, each with the gallery rows that match the query.
      count: [queries] int, the query's number of matches; more than it has rows where some are
        not in the gallery, as two captions of ECCV Caption.
    """

    rows: Sequence[np.ndarray]
    count: np.ndarray

    @classmethod
    def of_matrix(cls, matches: np.ndarray) -> Matches:
        """Returns the matches that a [queries, gallery] bool matrix marks."""
        rows = [np.flatnonzero(row) for row in matches]
        return cls(rows, np.array([len(row) for row in rows]))

    def block(self, part: slice, gallery: int) -> np.ndarray:
        """Returns some queries' matches as [queries of the part, gallery] bool."""
        rows = self.rows[part]
        matrix = np.zeros((len(rows), gallery), bool)
        for query, matching in enumerate(rows):
            matrix[query, matching] = True
        return matrix


def first_hits(
    queries: np.ndarray, gallery: jax.Array, relevant: np.ndarray, length: int
) -> np.ndarray:
    """Returns which of the first items match, for a block of queries.

    Among equally similar items those that do not match come first.

    Args:
      queries: [queries, dim] L2-normalised embeddings.
      gallery: [gallery, dim] L2-normalised embeddings.
      relevant: [queries, gallery] bool, true where an item matches.
      length: Length of the lists; they are shorter where the gallery is.

    Returns:
      [queries, length] bool, from the most similar item on.
    """
    length = min(length, len(gallery))
    similarity, hits, tied_misses = jax.device_get(_first_items(queries, gallery, relevant, length))
    hits = np.take_along_axis(hits, np.lexsort((hits, -similarity), axis=1), axis=1)
    # The list may end among equals: then those that do not match are the ones in it.
    tied = similarity == similarity[:, -1:]
    return np.where(tied, np.cumsum(tied, axis=1) > tied_misses[:, None], hits)


def top_lists(
    queries: np.ndarray, gallery: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the most similar items of each query.

    Args:
      queries: [queries, dim] L2-normalised embeddings.
      gallery: [gallery, dim] L2-normalised embeddings.
      length: Length of the lists; they are shorter where the gallery is.

    Returns:
      [queries, length] int32 rows of the gallery, the most similar first and the lower row first
      among equals; and their [queries, length] float32 similarities.
    """
    length = min(length, len(gallery))
    gallery = jax.device_put(gallery)
    similarities, rows = by_blocks(len(queries), lambda part: _top(queries[part], gallery, length))
    return rows, similarities


@functools.partial(jax.jit, static_argnames="length")
def _top(queries, gallery, length):
    # + 0 turns -0 into 0, which `top_k` would not count as its equal.
    return tuple(jax.lax.top_k(cosine(queries, gallery) + 0.0, length))


@functools.partial(jax.jit, static_argnames="length")
def _first_items(queries, gallery, relevant, length):
    """Returns the first items' similarities and whether they match, both [queries, length].

    And how many items, in the list or not, are as similar as its last one and do not match.
    """
    similarity = cosine(queries, gallery) + 0.0
    # Without the barrier XLA sees that only a slice of `first` is used below, and sorts whole rows.
    first, rows = jax.lax.optimization_barrier(jax.lax.top_k(similarity, length))
    tied_misses = (~relevant & (similarity == first[:, -1:])).sum(axis=1, dtype=jnp.int32)
    return first, jnp.take_along_axis(relevant, rows, axis=1), tied_misses

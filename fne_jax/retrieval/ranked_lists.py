"""The first matches of each query, in an order that equal similarities cannot blur."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from fne_jax.objectives.similarity_statistics import cosine

# Queries whose similarities to the whole gallery are held at once.
_BLOCK_ROWS = 256
_similarities = jax.jit(cosine)


@dataclasses.dataclass(frozen=True)
class Matches:
    """What is true of each query, labelled or not.

    Attributes:
      rows: [queries] of integer arrays, the rows of the gallery that match the query.
      count: [queries] int, the query's number of matches; more than it has rows where some are
        not in the gallery, as two captions of ECCV Caption.
    """

    rows: Sequence[np.ndarray]
    count: np.ndarray

    @classmethod
    def of_matrix(cls, matches: np.ndarray) -> Matches:
        """Returns those of a [queries, gallery] bool matrix."""
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
    queries: np.ndarray, gallery: np.ndarray, matches: Matches, depth: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields for block after block which of the first items match.

    Among equally similar items those that do not match come first.

    Args:
      queries: [queries, dim] L2-normalised embeddings.
      gallery: [gallery, dim] L2-normalised embeddings.
      matches: of the queries.
      depth: length of the lists that is needed, at least.

    Yields:
      The rows of the block, and [rows, at most depth or the most matches of a query] bool, from
      the most similar item on; a query's list is at least as long as its matches, if the gallery
      is.
    """
    for part, similarity in _blocks(queries, gallery):
        relevant = matches.block(part, len(gallery))
        length = min(len(gallery), max(depth, int(matches.count[part].max())))
        # One sort orders by similarity first, by the lowest bit (does not match) second.
        first = _first(_as_integers(similarity) * 2 + ~relevant, length)
        yield part, first % 2 == 0


def top_lists(
    queries: np.ndarray, gallery: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the most similar items of each query.

    Args:
      queries: [queries, dim] L2-normalised embeddings.
      gallery: [gallery, dim] L2-normalised embeddings.
      length: of the lists; they are shorter where the gallery is.

    Returns:
      [queries, length] int32 rows of the gallery, the most similar first and the lower row first
      among equals; and their [queries, length] float32 similarities.
    """
    length = min(length, len(gallery))
    rows = np.zeros((len(queries), length), np.int32)
    similarities = np.zeros((len(queries), length), np.float32)
    last = len(gallery) - 1
    for part, similarity in _blocks(queries, gallery):
        keys = _as_integers(similarity) * 2**32 + (last - np.arange(len(gallery)))
        rows[part] = last - _first(keys, length) % 2**32
        similarities[part] = np.take_along_axis(similarity, rows[part], axis=1)
    return rows, similarities


def _blocks(queries, gallery):
    gallery = jax.device_put(gallery)
    for start in range(0, len(queries), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        yield part, np.asarray(_similarities(queries[part], gallery))


def _as_integers(similarity):
    """Returns int64 numbers in the order of float32 ones, equal where they are equal."""
    bits = (similarity + np.float32(0)).view(np.int32).astype(np.int64)  # -0.0 + 0 is 0.0
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _first(keys, length):
    """Returns the `length` highest keys of each row, highest first."""
    keys = -keys
    if length < keys.shape[1]:
        keys = np.partition(keys, length - 1, axis=1)[:, :length]
    return -np.sort(keys, axis=1)

"""Exact search: the rows of the highest inner product, in blocks and on all cores.

The rows are float16, which NumPy converts so slowly (2 s for 1,000,000 x 768) that the conversion
would take most of the time. Shifted to where float32 has them, the bits of a float16 are its value
times 2^-112, subnormal values included; the queries are multiplied by 2^112 beforehand. Two
neighbouring values are taken apart as the halves of one 32-bit word.
"""

from __future__ import annotations

import concurrent.futures
import os

import numpy as np

# Rows converted at once, which stay in a core's cache: 0.4 MB at 768 dimensions.
_BLOCK_ROWS = 256
# Rows that a thread takes at a time.
_SPAN_ROWS = 16_384
# Scores of as many queries as fit are held at once: 256 MB.
_HELD_SCORES = 2**26
# Candidates whose exact scores are computed at once.
_CANDIDATE_ROWS = 512

# From float16 to float32: 10 and 23 bits of mantissa, and 112 between the offsets of the exponents.
_SHIFT = 23 - 10
_SCALE = 2.0**112
_KEPT_BITS = np.int32(-0x70002000)  # 0x8fffe000: the sign, 5 bits of exponent and 10 of mantissa
_WORD = np.dtype("<i4")


def nearest(rows: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows with the highest inner products with each query.

    They are those of a full sort by the products in float64, equal ones in the order of the rows:
    products in float32 only choose the candidates, with a margin above their rounding.

    Args:
      rows: [rows, dim] float16, which may be a memory map; read block by block.
      queries: [queries, dim] floats, of finite values.
      count: The number of rows wanted; fewer are found where there are fewer.

    Returns:
      [queries, count] int64 indices of rows, the best first, and their [queries, count] float32
      inner products.

    Raises ValueError if the shapes or the dtype of the rows are others.
    """
    if rows.ndim != 2 or rows.dtype != np.float16:
        raise ValueError(f"rows: expected float16 [rows, dim], got {rows.dtype} {rows.shape}")
    if queries.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(f"queries: expected [queries, {rows.shape[1]}], got {queries.shape}")
    count = min(count, len(rows))
    found = np.empty((len(queries), count), np.int64)
    products = np.empty((len(queries), count), np.float32)
    group = max(1, _HELD_SCORES // max(1, len(rows)))
    for first in range(0, len(queries), group):
        scores = _scores(rows, np.asarray(queries[first : first + group], np.float32))
        for number, row_scores in enumerate(scores, first):
            best = _best(rows, np.asarray(queries[number], np.float64), row_scores, count)
            found[number], products[number] = best
    return found, products


def exact_products(rows: np.ndarray, chosen: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Returns the inner products of some rows with a query, computed in float64.

    Equal rows have equal products, wherever they stand; those of a matrix product may differ.

    Args:
      rows: [rows, dim] float16.
      chosen: [chosen] indices of rows.
      query: [dim] floats.

    Returns:
      [chosen] float64.
    """
    products = np.empty(len(chosen))
    for start in range(0, len(chosen), _CANDIDATE_ROWS):
        part = slice(start, start + _CANDIDATE_ROWS)
        values = rows[chosen[part]].astype(np.float64)
        products[part] = (values * query).sum(axis=1)
    return products


def _best(rows, query, scores, count):
    """Returns the indices of a query's first rows and their products, from its [rows] scores."""
    if count == len(rows):
        candidates = np.arange(len(rows))
    else:
        last = np.partition(scores, len(scores) - count)[len(scores) - count]
        # Twice the most that rounding can do to a sum of `dim` products of rows of length 1.
        length = np.sqrt((query**2).sum())
        margin = 2 * (len(query) + 2) * np.finfo(np.float32).eps * length
        candidates = np.flatnonzero(scores >= last - margin)
    products = exact_products(rows, candidates, query)
    order = np.lexsort((candidates, -products))[:count]
    return candidates[order], products[order]


def _scores(rows, queries):
    """Returns the inner products of queries and rows in float32, [queries, rows]."""
    scores = np.empty((len(queries), len(rows)), np.float32)
    starts = range(0, len(rows), _SPAN_ROWS)

    def score(start):
        part = slice(start, start + _SPAN_ROWS)
        _score_span(rows[part], queries, scores[:, part])

    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(score, starts))
    return scores


def _score_span(rows, queries, scores):
    """Writes the inner products of some rows into [queries, rows] scores."""
    dim = rows.shape[1]
    if dim % 2:
        for start in range(0, len(rows), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            scores[:, part] = queries @ rows[part].astype(np.float32).T
        return
    words = rows.view(_WORD)
    scaled = (queries.T.astype(np.float64) * _SCALE).astype(np.float32)
    low, high = (np.ascontiguousarray(scaled[half::2]) for half in (0, 1))
    buffer = np.empty((min(_BLOCK_ROWS, len(rows)), dim // 2), _WORD)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = words[start : start + _BLOCK_ROWS]
        part = buffer[: len(block)]
        np.right_shift(block, 16 - _SHIFT, out=part)
        np.bitwise_and(part, _KEPT_BITS, out=part)
        products = part.view(np.float32) @ high
        np.left_shift(block, 16, out=part)
        np.right_shift(part, 16 - _SHIFT, out=part)
        np.bitwise_and(part, _KEPT_BITS, out=part)
        products += part.view(np.float32) @ low
        scores[:, start : start + len(block)] = products.T


def usable_cores():
    """Returns the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1

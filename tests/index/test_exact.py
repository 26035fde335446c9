"""Exact search against a full sort in float64: ties, every float16, sizes that fill no block."""

import tracemalloc

import numpy as np
import pytest

from fne_jax.index import exact


def unit_rows(seed, count, dim):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sorted_plainly(rows, queries, count):
    """Returns rows and products of each query by sorting all, the lower row first among equals."""
    found, scores = [], []
    for query in queries.astype(np.float64):
        products = [sum(np.multiply(row, query, dtype=np.float64).tolist()) for row in rows]
        order = sorted(range(len(rows)), key=lambda row: (-round(products[row], 12), row))
        found.append(order[:count])
        scores.append([products[row] for row in order[:count]])
    return np.array(found), np.array(scores)


@pytest.mark.parametrize(
    ("rows", "dim", "count"),
    [(1, 4, 1), (5, 7, 9), (255, 6, 3), (257, 12, 10), (700, 5, 4), (700, 33, 700)],
)
def test_the_first_rows_are_those_of_a_full_sort(rows, dim, count, monkeypatch):
    monkeypatch.setattr(exact, "_SPAN_ROWS", 512)
    monkeypatch.setattr(exact, "_HELD_SCORES", 1500)  # at 700 rows, two queries at a time
    gallery = unit_rows(0, rows, dim).astype(np.float16)
    queries = unit_rows(1, 5, dim).astype(np.float32)
    found, scores = exact.nearest(gallery, queries, count)
    expected, products = sorted_plainly(gallery, queries, count)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, products, rtol=1e-6, atol=1e-7)
    assert found.dtype == np.int64 and scores.dtype == np.float32


@pytest.mark.parametrize("dim", [24, 25])
def test_equal_rows_come_in_their_order_wherever_they_stand(dim):
    gallery = unit_rows(2, 1000, dim).astype(np.float16)
    query = unit_rows(3, 1, dim).astype(np.float32)
    twins = [999, 3, 511, 256, 255, 700]
    gallery[twins] = query[0]
    found, scores = exact.nearest(gallery, query, 4)
    assert found[0].tolist() == [3, 255, 256, 511] and len(set(scores[0])) == 1


def test_rows_nearer_than_float32_can_tell_are_put_in_order():
    # Both products round to the same float32; in float64 the second is larger.
    gallery = np.zeros((300, 4), np.float16)
    gallery[10], gallery[20] = [1, 0, 0, 0], [1, 2**-24, 0, 0]
    query = np.array([[1, 2**-3, 0, 0]], np.float32)
    assert np.float32(1 + 2**-27) == np.float32(1)
    assert exact.nearest(gallery, query, 2)[0].tolist() == [[20, 10]]


@pytest.mark.parametrize("columns", [2, 1])
def test_every_finite_float16_is_converted_exactly(columns):
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    rows = values.reshape(-1, columns)
    for column in range(columns):
        query = np.zeros((1, columns), np.float32)
        query[0, column] = 1
        scores = exact._scores(rows, query)[0]
        np.testing.assert_array_equal(scores, rows[:, column].astype(np.float32))


def test_a_memory_map_is_searched_as_it_lies(tmp_path):
    gallery = unit_rows(4, 600, 10).astype(np.float16)
    np.save(tmp_path / "rows.npy", gallery)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    queries = unit_rows(5, 3, 10)
    for ours, theirs in zip(
        exact.nearest(mapped, queries, 7), exact.nearest(gallery, queries, 7), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_other_shapes_and_dtypes_are_refused():
    rows = np.zeros((3, 4), np.float16)
    with pytest.raises(ValueError, match="expected float16"):
        exact.nearest(rows.astype(np.float32), np.zeros((1, 4)), 1)
    with pytest.raises(ValueError, match=r"expected \[queries, 4\]"):
        exact.nearest(rows, np.zeros((1, 5)), 1)


def test_memory_does_not_grow_with_the_dimension():
    gallery = np.zeros((40_000, 256), np.float16)  # all equal, so that all are candidates
    tracemalloc.start()
    try:
        exact.nearest(gallery, np.ones((1, 256), np.float32), 10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Some numbers a row, and blocks; all rows in float32 would take 41 MB.
    assert peak < 40_000 * 50 + 4e6 + exact.usable_cores() * 1e6

"""What one query costs among many stored rows."""

from __future__ import annotations

import pathlib
import tempfile
import tracemalloc
from typing import Any

import numpy as np

from fne_jax.benchmarks.timing import machine, median_seconds
from fne_jax.index import exact

_WRITTEN_ROWS = 10_000


def search(rows: int, dim: int, repeats: int) -> dict[str, Any]:
    """Times exact search among made-up rows that are memory-mapped, as an index keeps them.

    Args:
      rows: The number of rows.
      dim: Their dimension.
      repeats: Timed queries.

    Returns:
      One benchmark line. `query_s` is one query for its first ten rows, after the file was read;
      `memory_mib` the most memory that it takes beside the file; `cores` those it may use.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="fne_jax_benchmark_") as folder:
        path = pathlib.Path(folder) / "rows.npy"
        with path.open("wb") as stream:
            header = {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)}
            np.lib.format.write_array_header_1_0(stream, header)
            for start in range(0, rows, _WRITTEN_ROWS):
                vectors = rng.standard_normal((min(_WRITTEN_ROWS, rows - start), dim), np.float32)
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                stream.write(vectors.astype(np.float16))
        stored = np.load(path, mmap_mode="r")
        query = stored[:1].astype(np.float32)

        def first_ten():
            return exact.nearest(stored, query, 10)

        seconds = median_seconds({"query": first_ten}, repeats)
        tracemalloc.start()
        first_ten()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return {
        "benchmark": "search",
        "rows": rows,
        "dim": dim,
        "query_s": seconds["query"],
        "memory_mib": peak / 2**20,
        "cores": exact.usable_cores(),
        **machine(),
    }

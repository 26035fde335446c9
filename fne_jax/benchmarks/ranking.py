"""What ranking costs: a test split beside the bare product, one query among many rows."""

from __future__ import annotations

import functools
import pathlib
import tempfile
import tracemalloc
from typing import Any

import jax
import numpy as np

from fne_jax.benchmarks.timing import machine, median_seconds, peak_memory_bytes
from fne_jax.errors import UserError
from fne_jax.evaluation.metrics import retrieval_metrics
from fne_jax.evaluation.top_k import BLOCK_ROWS
from fne_jax.index import exact
from fne_jax.objectives.similarity_statistics import cosine

_WRITTEN_ROWS = 10_000


def retrieval(images: int, captions: int, dim: int, repeats: int) -> dict[str, Any]:
    """Times the standard metrics against the one product of all images and all captions.

    Args:
      images: The number of images to rank.
      captions: The number of captions to rank, dealt out to the images in turn.
      dim: The dimension of the embeddings.
      repeats: Timed calls of each.

    Returns:
      One benchmark line. `product_s` is the product with nothing kept of it, a block of images at
      a time; `peak_mib` the most memory that the process, JAX and the embeddings included, had
      held after the metrics were computed and before the product was.

    Raises:
      UserError: if there are fewer captions than images.
    """
    if captions < images:
        raise UserError(f"--captions is {captions}; expected one for each image, {images}")
    rng = np.random.default_rng(0)
    image_emb, text_emb = _unit_rows(rng, images, dim), _unit_rows(rng, captions, dim)
    owner = np.sort(np.arange(captions) % images)
    rank = functools.partial(retrieval_metrics, image_emb, text_emb, owner)
    rank()
    peak = peak_memory_bytes()
    on_device = jax.device_put(text_emb)
    blocks = [
        jax.device_put(image_emb[start : start + BLOCK_ROWS])
        for start in range(0, images, BLOCK_ROWS)
    ]
    product = jax.jit(cosine)

    def products():
        for block in blocks:
            product(block, on_device).block_until_ready()

    seconds = median_seconds({"retrieval": rank, "product": products}, repeats)
    return {
        "benchmark": "retrieval",
        "images": images,
        "captions": captions,
        "dim": dim,
        "retrieval_s": seconds["retrieval"],
        "product_s": seconds["product"],
        "ratio": seconds["retrieval"] / seconds["product"],
        "peak_mib": peak / 2**20,
        **machine(),
    }


def search(rows: int, dim: int, repeats: int) -> dict[str, Any]:
    """Times exact search among made-up rows that are memory-mapped, as an index keeps them.

    Returns:
      One benchmark line. `query_s` is one query for its first ten rows, after the file was read;
      `memory_mib` the most memory that it takes beside the file; `cores` those it may use.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="fne_jax_benchmark_") as folder:
        path = pathlib.Path(folder) / "rows.npy"
        stored = np.lib.format.open_memmap(path, "w+", np.float16, (rows, dim))
        for start in range(0, rows, _WRITTEN_ROWS):
            block = stored[start : start + _WRITTEN_ROWS]
            block[:] = _unit_rows(rng, len(block), dim)
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


def _unit_rows(rng, rows, dim):
    vectors = rng.standard_normal((rows, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors

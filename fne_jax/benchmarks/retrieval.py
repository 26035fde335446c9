"""What ranking a test split costs beside the bare product of its embeddings."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from fne_jax.benchmarks.timing import machine, median_seconds, peak_memory_bytes
from fne_jax.errors import UserError
from fne_jax.evaluation.metrics import retrieval_metrics
from fne_jax.evaluation.top_k import BLOCK_ROWS
from fne_jax.objectives.similarity_statistics import cosine


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


def _unit_rows(rng, rows, dim):
    vectors = rng.standard_normal((rows, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors

"""What FNE costs beside the bare products of anchors and keys."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fne_jax.benchmarks.timing import machine, median_seconds
from fne_jax.encoders.dual_encoder import unit
from fne_jax.objectives.features import Features
from fne_jax.objectives.fne_loss import fne_triplet_loss
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.similarity_statistics import (
    GaussianStatistics,
    SimilarityStatistics,
    cosine,
    update_similarity_statistics,
)

# Statistics under which many candidates are suspected and many are too easy, so that every branch
# of the weights is taken; their values do not change the work.
_STATS = SimilarityStatistics(
    positive=GaussianStatistics.from_moments(500, mean=0.1, variance=0.004),
    negative=GaussianStatistics.from_moments(1000, mean=0.05, variance=0.002),
)


# Batch, slots and dimension: the paper's own setting, and a large batch over a long queue.
CASES = ((32, 8224, 768), (256, 65536, 768))
# Keys scored at a time that suit a CPU's cache; measured beside all at once.
KEY_CHUNK = 1024


def strategy_lines(repeats: int) -> Iterator[dict[str, Any]]:
    """Yields a line for each case and way to score its keys."""
    for batch, queue_size, dim in CASES:
        for chunk in (None, KEY_CHUNK):
            yield strategy(batch, queue_size, dim, chunk, repeats)


def strategy(
    batch: int, queue_size: int, dim: int, key_chunk: int | None, repeats: int
) -> dict[str, Any]:
    """Times statistics, both directions and the gradient against the two bare products.

    Of the queue `key_chunk` keys, a multiple of 16, are scored at a time; all for None.

    Returns:
      One benchmark line: medians in seconds and their ratio, and the strategy's scratch memory.
    """
    rng = jax.random.key(0)
    features = [_unit_rows(jax.random.fold_in(rng, n), batch, dim) for n in range(4)]
    queue = MemoryQueue.create(rng, queue_size, dim)
    image_id = jnp.arange(batch, dtype=jnp.int32)
    image_keys, text_keys = (
        jnp.concatenate([batch_keys, queue_keys])
        for batch_keys, queue_keys in ((features[2], queue.image), (features[3], queue.text))
    )

    def step(image_emb, text_emb, momentum_image_emb, momentum_text_emb, queue):
        stats = update_similarity_statistics(_STATS, image_emb, text_emb)

        def loss_fn(*online):
            features = Features(*online, momentum_image_emb, momentum_text_emb, image_id)
            return fne_triplet_loss(features, queue, stats, rng, key_chunk=key_chunk)

        return stats, jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(image_emb, text_emb)

    @jax.jit
    def products(image_emb, text_emb, image_keys, text_keys):
        return cosine(image_emb, text_keys), cosine(text_emb, image_keys)

    compiled = jax.jit(step).lower(*features, queue).compile()
    seconds = median_seconds(
        {
            "strategy": functools.partial(compiled, *features, queue),
            "products": functools.partial(products, *features[:2], image_keys, text_keys),
        },
        repeats,
    )
    return {
        "benchmark": "strategy",
        "batch": batch,
        "queue": queue_size,
        "dim": dim,
        "key_chunk": key_chunk,
        "strategy_s": seconds["strategy"],
        "products_s": seconds["products"],
        "ratio": seconds["strategy"] / seconds["products"],
        "scratch_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        **machine(),
    }


def _unit_rows(rng, rows, dim):
    return unit(jax.random.normal(rng, (rows, dim)))

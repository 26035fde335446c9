"""The similarity statistics that a model gives over a whole split, held still."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    update_similarity_statistics,
)


def split_statistics(
    image_emb: np.ndarray,
    text_emb: np.ndarray,
    caption_image: np.ndarray,
    *,
    batch: int,
    seed: int,
) -> SimilarityStatistics:
    """Returns what an epoch of batches adds up to, as in training but for the model's learning.

    Args:
      image_emb: [images, dim] L2-normalised.
      text_emb: [captions, dim] L2-normalised.
      caption_image: [captions] index of each caption's own image.
      batch: pairs that compete for each other; a last batch of fewer is left out.
      seed: of the order of the captions.
    """
    update = jax.jit(update_similarity_statistics)
    stats = SimilarityStatistics.create()
    order = np.random.default_rng(seed).permutation(len(text_emb))
    for start in range(0, len(order) - batch + 1, batch):
        rows = order[start : start + batch]
        images = caption_image[rows]
        stats = update(
            stats,
            jnp.asarray(image_emb[images]),
            jnp.asarray(text_emb[rows]),
            jnp.asarray(images[:, None] == images[None, :]),
        )
    return jax.device_get(stats)

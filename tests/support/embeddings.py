"""Made-up embeddings and similarity statistics."""

import jax.numpy as jnp
import numpy as np

from fne_jax.objectives.similarity_statistics import GaussianStatistics, SimilarityStatistics


def statistics(positive=(0.7, 0.1), negative=(0.4, 0.15), count=1000):
    def gaussian(mean, deviation):
        return GaussianStatistics(
            *map(jnp.float32, (count, mean * count, deviation**2 * (count - 1)))
        )

    return SimilarityStatistics(gaussian(*positive), gaussian(*negative))


def unit_rows(rng, *shape):
    rows = rng.normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

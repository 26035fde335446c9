"""Figures of a run for TensorBoard."""

from __future__ import annotations

import logging

import jax
import ml_collections
import numpy as np

from fne_jax.objectives.similarity_statistics import SimilarityStatistics

_log = logging.getLogger(__name__)


def statistics_images(
    stats: SimilarityStatistics, fne: ml_collections.ConfigDict
) -> dict[str, np.ndarray]:
    """Returns `statistics_figures` as [1, height, width, 3] uint8, as TensorBoard takes them.

    None, with a warning, where matplotlib is not installed.

    Args:
      stats: of the state.
      fne: `config.fne`.
    """
    try:
        from fne_jax import figures
    except ImportError as error:
        _log.warning("no figures in TensorBoard: pip install %s", error.name)
        return {}
    drawn = figures.statistics_figures(jax.device_get(stats), fne)
    return {name: figures.as_pixels(figure)[None] for name, figure in drawn.items()}

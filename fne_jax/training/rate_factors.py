"""Factors on the learning rate: of a tower, and of a layer by its depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp

from fne_jax.encoders.freezing import is_after_layers, layer_of
from fne_jax.encoders.transformer import Tower


def learning_rate_factors(
    module: nn.Module, factors: Mapping[str, float], layer_decay: float, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the factor on the learning rate of each parameter.

    Of n layers the last has `layer_decay`, the one below that times `layer_decay`, ..., and the
    embeddings `layer_decay ** (n + 1)`; what comes after the layers has 1 (Bao et al. 2021, BEiT,
    arXiv 2106.08254, appendix).

    Args:
      module: The two towers; the layers of other modules are not known, and have no decay.
      factors: Of each tower by name, its projection included, and of other groups.
      layer_decay: The factor from a layer to the one below; 1 for none.
      params: The parameters that are trained.

    Returns:
      A tree shaped as `params`, of [] arrays, or of [layers, 1, ...] ones for stacked layers.
    """
    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict(
        {
            path: factors[path[0].partition("_")[0]]
            * _depth_factor(getattr(module, path[0], None), path[1:], layer_decay, leaf.ndim)
            for path, leaf in flat.items()
        }
    )


def _depth_factor(tower, path, decay, rank):
    if not isinstance(tower, Tower) or is_after_layers(tower, path):
        return jnp.ones(())
    layer = layer_of(tower, path)
    if layer is None:
        return jnp.float32(decay ** (tower.layers + 1))
    if isinstance(layer, slice):
        powers = tower.layers - jnp.arange(layer.start, layer.stop)
        return (decay ** powers.astype(jnp.float32)).reshape(-1, *(1,) * (rank - 1))
    return jnp.float32(decay ** (tower.layers - layer))

"""Adam, its learning-rate schedule, clipping, decay and factors on the rate, all optax."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from fne_jax.encoders.freezing import flatten, layer_of, unflatten
from fne_jax.encoders.transformer import Tower
from fne_jax.objectives import learned_scalars
from fne_jax.objectives.learned_scalars import LEARNED, LOG_TEMPERATURE_FACTOR


def learning_rate_schedule(
    optimizer: ml_collections.ConfigDict, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """Returns the learning rate of `config.optimizer`, a function of the updates applied."""
    warmup_steps = round(optimizer.warmup_epochs * steps_per_epoch)
    peak = optimizer.learning_rate
    if optimizer.schedule == "step":
        # Several may fall on one step, those within the rise on its end.
        factors = collections.defaultdict(lambda: 1.0)
        for epoch in optimizer.step_epochs:
            step = max(round(epoch * steps_per_epoch) - warmup_steps, 0)
            factors[step] *= optimizer.step_factor
        after = optax.piecewise_constant_schedule(peak, dict(factors))
    else:  # cosine
        after = optax.cosine_decay_schedule(peak, max(total_steps - warmup_steps, 1))
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def build_optimizer(
    optimizer: ml_collections.ConfigDict,
    schedule: optax.Schedule,
    module: nn.Module,
    temperature: float | None = None,
) -> optax.GradientTransformation:
    """Returns the update rule: clip, Adam, decay, learning rate, factors, bounds.

    Args:
      optimizer: `config.optimizer`, see configs/base.py.
      schedule: The learning rate as a function of the updates already applied.
      module: The two towers, for the depth of their layers.
      temperature: Where a temperature that is learned begins; None if none is.
    """

    def scaled(updates, params):
        factors = learning_rate_factors(optimizer, module, params)
        return jax.tree.map(jnp.multiply, updates, factors)

    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, _is_matrix),
        optax.scale_by_learning_rate(schedule),
        optax.stateless(scaled),
        *(() if temperature is None else (_bounded_temperature(temperature),)),
    )


def updates_applied(opt_state: optax.OptState) -> jax.Array:
    """Returns the [] int32 number of updates applied: the steps that were not bad."""
    (_, count), *_ = optax.tree.get_all_with_path(opt_state, "count")
    return count


def _bounded_temperature(start):
    """Returns a transformation of updates that keeps the learned temperature within its bounds."""
    bounds = learned_scalars.log_factor_bounds(start)

    def within(updates, params):
        before = params[LEARNED][LOG_TEMPERATURE_FACTOR]
        after = jnp.clip(before + updates[LEARNED][LOG_TEMPERATURE_FACTOR], *bounds)
        learned = updates[LEARNED] | {LOG_TEMPERATURE_FACTOR: after - before}
        return updates | {LEARNED: learned}

    return optax.stateless(within)


# Names of parameters of rank 1, of tokens and their places, and of what reads them.
_NO_MATRICES = (
    "bias",
    "scale",
    "attention_scale",
    "mlp_scale",
    "class_token",
    "register_tokens",
    "position_embedding",
    "relative_attention_bias",
    "probe",
)


def _is_matrix(params):
    # Stacked layers (scan) carry a leading axis, so biases are told by name rather than by rank.
    def decayed(path, _):
        if path[0].key == LEARNED:
            return False
        return path[-1].key not in _NO_MATRICES

    return jax.tree_util.tree_map_with_path(decayed, params)


def learning_rate_factors(
    optimizer: ml_collections.ConfigDict, module: nn.Module, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the factor on the learning rate of each parameter that is trained.

    That is the factor of its tower, or of what the objective learns, times that of its depth: of n
    layers the last has `layer_decay`, the one below that times `layer_decay`, ..., and the
    embeddings `layer_decay ** (n + 1)`; what comes after the layers has 1 (Bao et al. 2021, BEiT,
    arXiv 2106.08254, appendix). The layers of other modules than the towers are not known, and have
    no decay.

    Returns a tree shaped as `params`, of [] arrays, or of [layers, 1, ...] ones for stacked layers.
    """
    factors = {
        "image": optimizer.image_factor,
        "text": optimizer.text_factor,
        LEARNED: optimizer.objective_factor,
    }
    found = {}
    for path, leaf in flatten(params).items():
        tower = getattr(module, path[0], None)
        depth = _depth_factor(tower, path[1:], optimizer.layer_decay, leaf.ndim)
        found[path] = factors[path[0].partition("_")[0]] * depth  # a projection has its tower's
    return unflatten(found)


def _depth_factor(tower, path, decay, rank):
    if not isinstance(tower, Tower) or path[0] in tower.after_layers:
        return jnp.float32(1)
    layer = layer_of(tower, path)
    if layer is None:
        return jnp.float32(decay ** (tower.layers + 1))
    if isinstance(layer, slice):
        powers = tower.layers - jnp.arange(layer.start, layer.stop)
        return (decay ** powers.astype(jnp.float32)).reshape(-1, *(1,) * (rank - 1))
    return jnp.float32(decay ** (tower.layers - layer))

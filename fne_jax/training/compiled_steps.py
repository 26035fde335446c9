"""The train step of each phase of a run, as its config composes it, jitted or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from fne_jax.encoders.inputs import FEATURES, READ, frozen_features
from fne_jax.encoders.transformer import cast_kernels
from fne_jax.model.kept_features import kept_towers
from fne_jax.model.model import Model, initial_params
from fne_jax.objectives import registry
from fne_jax.objectives.known_matches import KnownMatches
from fne_jax.objectives.similarity_statistics import StatisticsRule
from fne_jax.parallel import sharding
from fne_jax.training.encoder_passes import MicroBatches, WholeBatch
from fne_jax.training.timeline import Phase, Timeline
from fne_jax.training.train_state import TrainState
from fne_jax.training.train_step import StepSettings, train_step


def jitted_steps(
    config: ml_collections.ConfigDict,
    timeline: Timeline,
    model: Model,
    schedule: optax.Schedule,
    state: TrainState,
) -> dict[Phase, Callable]:
    """Returns the train step of each phase, compiled on its first use; it donates the state.

    With an oracle or a file of matches, the steps take the table of these as a third argument.

    Args:
      config: The resolved config.
      timeline: The step counts of the run.
      model: The model to be trained.
      schedule: The learning rate as a function of the updates already applied.
      state: Concrete or abstract, for the structure and the shardings of its arrays.
    """
    mesh = model.mesh
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    placed = sharding.state_shardings(mesh, state)
    cast = functools.partial(cast_kernels, dtype=jnp.dtype(config.encoder.compute_dtype))
    layout = sharding.StepLayout(mesh, cast)
    passes = WholeBatch(layout)
    if config.micro_batches > 1:
        passes = MicroBatches(layout, config.micro_batches)
    settings = StepSettings(
        module=model.module,
        passes=passes,
        layout=layout,
        momentum=config.momentum,
        mask_same_image=config.fne.mask_same_image,
        pixel_statistics=(config.image_mean, config.image_std),
        learning_rate=schedule,
    )
    rule = StatisticsRule(config.fne.ema_decay, timeline.steps_per_epoch)
    common = {"settings": settings, "statistics_rule": rule}
    warmup, main = registry.warmup_objective(config), registry.main_objective(config)
    use_keys = registry.uses_keys(config)
    steps = {
        Phase.WARMUP: functools.partial(_warmup_step, objective=warmup, use_keys=False),
        Phase.WARMUP_FILLING: functools.partial(_warmup_step, objective=warmup, use_keys=True),
        Phase.FNE: functools.partial(train_step, objective=main, use_keys=use_keys),
    }
    known = (replicated,) if registry.uses_matches(config) else ()
    return {
        phase: jax.jit(
            functools.partial(step, **common),
            in_shardings=(placed, rows, *known),
            out_shardings=(placed, replicated, replicated),
            donate_argnums=0,
        )
        for phase, step in steps.items()
    }


def abstract_batch(model: Model) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of a batch of a run's train steps.

    Args:
      model: The model to be trained.
    """
    config, module = model.config, model.module
    batch, side = config.global_batch_size, config.encoder.image.image_size
    tokens = (batch, config.data.text_length)
    shapes = {
        "image": ((batch, side, side, 3), jnp.uint8),
        "input_ids": (tokens, jnp.int32),
        "attention_mask": (tokens, jnp.int32),
        "image_id": ((batch,), jnp.int32),
        "pair_id": ((batch,), jnp.int32),
    }
    arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    params, _ = jax.eval_shape(lambda: initial_params(module, config, jax.random.key(0)))
    statistics = config.image_mean, config.image_std
    for tower in kept_towers(module, config, training=True):
        own = {name: arrays[name] for name in READ[tower]}
        run = functools.partial(frozen_features, module.apply, pixel_statistics=statistics)
        arrays[FEATURES[tower]] = jax.eval_shape(run, params, own)
        if tower == "image":
            del arrays["image"]
    rows = sharding.batch_sharding(model.mesh)
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows)
        for name, array in arrays.items()
    }


def _warmup_step(state, batch, known=None, **settings):
    """`train_step` of the warm-up, which runs of other matches share: it does not look at them."""
    del known
    return train_step(state, batch, **settings)


def compile_phases(
    jitted: Mapping[Phase, Callable],
    phases: Collection[Phase],
    state: TrainState,
    batch: dict[str, np.ndarray] | None,
    mesh: jax.sharding.Mesh,
    known: tuple[KnownMatches, ...] = (),
) -> dict[Phase, Callable]:
    """Returns the compiled train step of each phase that is still to come.

    Args:
      jitted: What `jitted_steps` returned.
      phases: The phases that are still to come.
      state: The state before the next step.
      batch: This process's rows of any batch; None if no step is to come.
      mesh: The devices.
      known: What else the steps take: the tables of `matches.known_matches`.
    """
    if batch is None:
        return {}
    rows = sharding.to_devices(batch, mesh)
    return {phase: jitted[phase].lower(state, rows, *known).compile() for phase in phases}

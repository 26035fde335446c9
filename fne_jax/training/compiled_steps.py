"""The train step of each phase of a run, as its config composes it, jitted or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from fne_jax.encoders.transformer import cast_kernels
from fne_jax.objectives import registry
from fne_jax.objectives.known_matches import KnownMatches
from fne_jax.parallel import sharding
from fne_jax.training.encoder_passes import MicroBatches, WholeBatch
from fne_jax.training.timeline import Phase, Timeline
from fne_jax.training.train_state import TrainState
from fne_jax.training.train_step import StepSettings, train_step


def jitted_steps(
    config: ml_collections.ConfigDict,
    timeline: Timeline,
    mesh: jax.sharding.Mesh,
    schedule: optax.Schedule,
    state: TrainState,
) -> dict[Phase, Callable]:
    """Returns the train step of each phase, compiled on its first use; it donates the state.

    With an oracle or a file of matches, the steps take the table of these as a third argument.

    Args:
      config: The resolved config.
      timeline: The step counts of the run.
      mesh: The devices.
      schedule: The learning rate as a function of the updates already applied.
      state: Concrete or abstract, for the structure and the shardings of its arrays.

    Raises:
      UserError: if the config names an objective that there is not.
    """
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    placed = sharding.state_shardings(mesh, state)
    cast = functools.partial(cast_kernels, dtype=jnp.dtype(config.encoder.compute_dtype))
    layout = sharding.StepLayout(mesh, cast)
    passes = WholeBatch(layout)
    if config.micro_batches > 1:
        passes = MicroBatches(layout, config.micro_batches)
    settings = StepSettings(
        passes=passes,
        layout=layout,
        momentum=config.momentum,
        mask_same_image=config.fne.mask_same_image,
        pixel_statistics=(config.image_mean, config.image_std),
        learning_rate=schedule,
    )
    rule = registry.statistics_rule(config.fne, timeline.steps_per_epoch)
    common = {"settings": settings, "statistics_rule": rule}
    warmup, main = registry.warmup_objective(config), registry.main_objective(config)
    steps = {
        Phase.WARMUP: functools.partial(_warmup_step, objective=warmup, write_queue=False),
        Phase.WARMUP_FILLING: functools.partial(_warmup_step, objective=warmup, write_queue=True),
        Phase.FNE: functools.partial(train_step, objective=main, write_queue=True),
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

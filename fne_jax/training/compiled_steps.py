"""The train step of each phase of a run, as its config composes it, jitted or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import jax
import ml_collections
import numpy as np
import optax

from fne_jax.data.images import device_augmentation
from fne_jax.objectives import registry
from fne_jax.parallel import sharding
from fne_jax.training.encoder_passes import MicroBatches, WholeBatch
from fne_jax.training.phases import Phase, RunPlan
from fne_jax.training.train_state import TrainState
from fne_jax.training.train_step import given_pixels, train_step


def jitted_steps(
    config: ml_collections.ConfigDict,
    plan: RunPlan,
    mesh: jax.sharding.Mesh,
    schedule: optax.Schedule,
    state: TrainState,
) -> dict[Phase, Callable]:
    """Returns the compiled-on-first-use train step of each phase, the state donated.

    Args:
      config: of the run.
      plan: its step counts.
      mesh: its devices.
      schedule: its learning rate.
      state: concrete or abstract, for the structure and the shardings of its arrays.
    """
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    placed = sharding.state_shardings(mesh, state)
    passes = WholeBatch()
    if config.micro_batches > 1:
        passes = MicroBatches(config.micro_batches, sharding.micro_batch_sharding(mesh))
    shared = {
        "augment": augmentation_in_step(config),
        "passes": passes,
        "layout": sharding.StepLayout(mesh),
        "momentum": config.momentum,
        "mask_same_image": config.fne.mask_same_image,
        "next_statistics": registry.next_statistics(config.fne, plan.steps_per_epoch),
        "image_mean": config.image_mean,
        "image_std": config.image_std,
        "learning_rate": schedule,
    }
    warmup, main = registry.warmup_objective(config), registry.main_objective(config)
    kinds = {
        Phase.WARMUP: {"objective": warmup, "write_queue": False},
        Phase.WARMUP_FILLING: {"objective": warmup, "write_queue": True},
        Phase.FNE: {"objective": main, "write_queue": True},
    }
    return {
        phase: jax.jit(
            functools.partial(train_step, **kind, **shared),
            in_shardings=(placed, rows),
            out_shardings=(placed, whole, whole),
            donate_argnums=0,
        )
        for phase, kind in kinds.items()
    }


def augmentation_in_step(config: ml_collections.ConfigDict) -> Callable:
    """Returns the train step's `augment`."""
    if config.data.augment_on == "host" or config.data.augmentation == "none":
        return given_pixels
    size = config.encoder.image.image_size
    return functools.partial(device_augmentation.augment_batch, size=size)


def compiled_steps(
    config: ml_collections.ConfigDict,
    plan: RunPlan,
    phases: Collection[Phase],
    mesh: jax.sharding.Mesh,
    schedule: optax.Schedule,
    state: TrainState,
    batch: dict[str, np.ndarray],
) -> dict[Phase, Callable]:
    """Returns the train step of each phase that is still to come, compiled.

    Args:
      config: see configs/base.py.
      plan: of the run.
      phases: that are still to come.
      mesh: of all devices.
      schedule: the learning rate.
      state: before the next step.
      batch: this process's rows of any batch.
    """
    rows = sharding.to_devices(batch, mesh)
    jitted = jitted_steps(config, plan, mesh, schedule, state)
    return {phase: jitted[phase].lower(state, rows).compile() for phase in phases}

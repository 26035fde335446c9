"""A training run from its config to its last checkpoint."""

from __future__ import annotations

import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import transformers

from fne_jax import configuration
from fne_jax.data.batches import Batch, BatchOrder, training_batches
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.loading import load_split
from fne_jax.data.pairs import PairDataset
from fne_jax.encoders import towers
from fne_jax.errors import UserError
from fne_jax.model.model import Model, build_model, load_evaluation_split
from fne_jax.model.tokenizers import run_tokenizer, store_tokenizer
from fne_jax.parallel import processes, sharding
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.progress import Progress
from fne_jax.training.checkpointing import Checkpoints
from fne_jax.training.compiled_steps import compile_phases, jitted_steps
from fne_jax.training.data_clock import DataClock
from fne_jax.training.interruption import StopRequest
from fne_jax.training.metric_log import MetricLog
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.step_results import StepResults
from fne_jax.training.supervisor import Supervisor
from fne_jax.training.timeline import Timeline
from fne_jax.training.train_state import (
    TrainState,
    abstract_state,
    initial_state,
    with_first_weights,
)

_log = logging.getLogger(__name__)


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    warmup_only: bool = False,
    module: nn.Module | None = None,
) -> None:
    """Trains, validates and checkpoints a run; resumes the one that the workdir holds.

    Args:
      config: The config, see configs/base.py.
      workdir: The folder of the run; README.md tells what it holds afterwards.
      warmup_only: Stop, saved, where the warm-up ends, for runs that go on from there in copies of
        the folder.
      module: The two towers, in place of those that the config describes.

    Raises:
      UserError: on wrong input, when too many steps in a row had no finite loss or gradient, or
        when a checkpoint cannot be written.
      Interrupted: After a signal that asks to stop, with everything saved.
    """
    # Config and devices.
    config, architectures = configuration.resolve(config, workdir)
    use_compile_cache(config.compile_cache)
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp)

    # Data.
    with processes.first_process_first("data"):
        train = load_split(config.data, config.encoder.image.image_size, "train")
        val = load_evaluation_split(config, "val")
    order = batch_order(config, train)
    timeline = Timeline.of(config, order.steps_per_epoch)
    last_step = timeline.warmup_end if warmup_only else timeline.total_steps
    _log.info("data: %d training pairs, %s", len(train.captions), timeline)

    # Model, optimizer and steps: what may be wrong with them shows before anything is written.
    stop = StopRequest()
    tokenizer = run_tokenizer(config, workdir, train.captions)
    model = build_model(
        config, architectures, tokenizer, mesh, module=module, before_batch=stop.check
    )
    schedule = learning_rate_schedule(
        config.optimizer, timeline.steps_per_epoch, timeline.total_steps
    )
    abstract = abstract_state(model, schedule)
    jitted = jitted_steps(config, timeline, mesh, schedule, abstract)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    _log.info("model: %.1f M parameters on %d devices", count / 1e6, mesh.size)

    # Workdir.
    with processes.first_process_first("workdir"):
        begin_workdir(workdir, config, architectures, tokenizer)

    # State, restored or new.
    checkpoints = Checkpoints(workdir, config.checkpoint)
    state, position = restored_or_new(checkpoints, model, abstract)
    first_step = int(state.step)
    # A signal may have come before or during the validation of a step that was then saved.
    validated = first_step not in timeline.validation_steps or checkpoints.is_validated(first_step)
    if first_step >= last_step and validated:
        _log.info("the run is complete: %d steps are done", first_step)
        return

    # What watches over the run.
    supervisor = Supervisor(
        config=config,
        timeline=timeline,
        last_step=last_step,
        model=model,
        val=val,
        checkpoints=checkpoints,
        log=MetricLog(workdir, first_step, validated),
        results=StepResults(order, train, position),
        stop=stop,
        profile=profiler(config.logging.profile_step, workdir),
    )
    if not validated:
        supervisor.validate_restored(state, first_step)

    # Loop. Each phase is compiled before a signal is held back, and before an hour of training can
    # be lost to a program of a later phase that does not fit the devices.
    tokens = model.tokenize(train.captions, config.data.text_length)
    steps = range(first_step, last_step)
    first_batch, batches = peeked(batches_of(config, train, tokens, order, steps, mesh))
    phases = {timeline.phase(step) for step in steps}
    compiled = compile_phases(jitted, phases, state, first_batch, mesh)
    clock = DataClock(batches)
    with stop, training_progress(config, steps) as progress:
        for step, batch in enumerate(clock, start=first_step):
            phase = timeline.phase(step)
            if step == first_step or phase is not timeline.phase(step - 1):
                _log.info("step %d: %s", step, phase.value)
            # Nothing but the batch is copied to the devices, which would stall every step.
            rows = sharding.to_devices(batch, mesh)
            with jax.transfer_guard_host_to_device("disallow"):
                state, scalars, negatives = compiled[phase](state, rows)
            supervisor.after_step(state, scalars, negatives, step + 1, clock, progress)
        supervisor.finish()
    _log.info("the run is complete: %d steps", last_step)


def batch_order(config: ml_collections.ConfigDict, train: PairDataset) -> BatchOrder:
    """Returns the order of the training pairs.

    Raises:
      UserError: if there are fewer pairs than a batch takes.
    """
    if len(train.captions) < config.global_batch_size:
        raise UserError(
            f"config.global_batch_size is {config.global_batch_size}, more than the "
            f"{len(train.captions)} training pairs"
        )
    return BatchOrder(config.seed, len(train.captions), config.global_batch_size)


def batches_of(
    config: ml_collections.ConfigDict,
    train: PairDataset,
    tokens: tuple[Any, Any],
    order: BatchOrder,
    steps: range,
    mesh: jax.sharding.Mesh,
) -> Iterator[Batch]:
    """Returns this process's rows of the batches of a range of steps, as the config says."""
    return training_batches(
        train,
        tokens,
        order.rows(steps, sharding.local_rows(mesh, config.global_batch_size)),
        TrainingImages(config.encoder.image.image_size, config.data.augmentation, config.seed),
        config.data.prefetch,
    )


def peeked(batches: Iterator[Batch]) -> tuple[Batch | None, Iterator[Batch]]:
    """Returns the first batch, or None without any, and an iterator over all of them."""
    first = next(batches, None)
    return first, batches if first is None else itertools.chain([first], batches)


def begin_workdir(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    architectures: Mapping[str, Mapping[str, Any]],
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    """Creates the folder of a run with all that restores its model, or checks the one there.

    Raises:
      UserError: if it cannot be written to, holds a run of another config, or is not shared by all
        processes.
    """
    if jax.process_index() != 0:
        if not (workdir / configuration.FILE_NAME).exists():
            raise UserError(
                f"--workdir={workdir}: process {jax.process_index()} does not find there what "
                "process 0 wrote; give a folder on a file system that all processes share"
            )
        configuration.store_config(config, workdir)  # compares
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".write_test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written to: {error}") from error
    configuration.store_config(config, workdir)
    towers.store_architectures(architectures, workdir)
    store_tokenizer(tokenizer, workdir)


def restored_or_new(
    checkpoints: Checkpoints, model: Model, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state that a run goes on with, and its position: empty for a new run."""
    restored = checkpoints.restore_newest(like)
    if restored is not None:
        _log.info("resumed from step %d of %s", int(restored[0].step), checkpoints.folder.parent)
        return restored
    return with_first_weights(initial_state(model, like), model.config), {}


def training_progress(config: ml_collections.ConfigDict, steps: range) -> Progress:
    """Returns the display of how many steps are done, shown by process 0 alone."""
    return Progress(
        "train",
        steps.stop,
        completed=steps.start,
        every_seconds=config.logging.progress_seconds,
        enabled=jax.process_index() == 0,
    )


def profiler(profile_step: int, workdir: pathlib.Path) -> Callable[[int], None]:
    """Returns clu's profiler, which writes for TensorBoard, or what does nothing."""
    if not profile_step or jax.process_index() != 0:
        return lambda step: None
    from clu import periodic_actions

    return periodic_actions.Profile(
        logdir=str(workdir), num_profile_steps=5, first_profile=profile_step
    )

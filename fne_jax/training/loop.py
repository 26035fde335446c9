"""A training run from its config to its last checkpoint."""

from __future__ import annotations

import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from fne_jax import configuration
from fne_jax.data.batches import Batch, BatchOrder, training_batches
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.pairs import PairDataset
from fne_jax.data.sources.registry import load_split
from fne_jax.errors import UserError
from fne_jax.model.model import build_model, load_evaluation_split
from fne_jax.model.tokenizers import run_tokenizer
from fne_jax.parallel import processes, sharding
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.progress import Progress
from fne_jax.training import workdir as run_folder
from fne_jax.training.checkpointing import Checkpoints
from fne_jax.training.compiled_steps import compile_phases, jitted_steps
from fne_jax.training.data_clock import DataClock
from fne_jax.training.interruption import StopRequest
from fne_jax.training.matches import known_matches
from fne_jax.training.metric_log import MetricLog
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.step_results import StepResults
from fne_jax.training.supervisor import Supervisor
from fne_jax.training.timeline import Timeline
from fne_jax.training.trackers import check_installed, open_trackers
from fne_jax.training.train_state import abstract_state, first_state

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
      workdir: The folder of the run; docs/runs.md tells what it holds afterwards.
      warmup_only: Stop, saved, where the warm-up ends, for runs that go on from there in copies of
        the folder.
      module: The two towers, in place of those that the config describes.

    Raises:
      UserError: on wrong input, when too many steps in a row had no finite loss or gradient, or
        when a checkpoint cannot be written.
      Interrupted: After a signal that asks to stop, with everything saved.
    """
    with run_folder.errors_told(workdir):
        _train(config, workdir, warmup_only, module)


def _train(config, workdir, warmup_only, module):
    # Config and devices.
    begun = run_folder.is_begun(workdir)
    config, architectures = configuration.resolve(config, workdir if begun else None)
    if begun:
        run_folder.check_begun(workdir, config)
    with processes.failing_together("config.logging.also"):
        check_installed(config.logging.also)
    use_compile_cache(config.compile_cache)
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp)
    configuration.check_batches(config, mesh.size)

    # Data.
    train, val, known = _load(config, mesh)
    data = {"train": train.identity, "val": val.identity} | known.data
    if begun:
        run_folder.check_data(workdir, data)
    order = batch_order(config, train)
    timeline = Timeline.of(config, order.steps_per_epoch)
    last_step = timeline.warmup_end if warmup_only else timeline.total_steps
    _log.info("data: %d training pairs, %s", len(train.captions), timeline)
    if timeline.fne_start_step >= timeline.total_steps and not warmup_only:
        _log.warning(
            "the run ends within the warm-up, without any step of config.objective: "
            "config.fne.start_epoch is %s, config.num_epochs %s",
            config.fne.start_epoch,
            config.num_epochs,
        )

    # Model, optimizer and steps.
    stop = StopRequest()
    tokenizer = run_tokenizer(config, workdir if begun else None, train.captions)
    model = build_model(
        config, architectures, tokenizer, mesh, module=module, before_batch=stop.check
    )
    schedule = learning_rate_schedule(
        config.optimizer, timeline.steps_per_epoch, timeline.total_steps
    )
    abstract = abstract_state(model, schedule)
    jitted = jitted_steps(config, timeline, model, schedule, abstract)
    trained, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
        for params in (abstract.params, abstract.frozen_params)
    )
    share = f", {frozen:.1f} M of them frozen," if frozen else ""
    _log.info("model: %.1f M parameters%s on %d devices", trained + frozen, share, mesh.size)
    state = None if begun else first_state(model, abstract)

    # Nothing is written before here, where all that may be wrong has shown.
    with run_folder.held(workdir):
        files = run_folder.RunFiles(config, architectures, tokenizer, data)
        run_folder.begin(workdir, files, begun)

        # State, new or restored.
        checkpoints, position = Checkpoints(workdir, config.checkpoint), {}
        if begun:
            state, position = checkpoints.restore_newest(abstract)
            _log.info("resumed from step %d of %s", int(state.step), workdir)
        first_step = int(state.step)
        # A signal may have come before or during the validation of a step that was then saved.
        validated = not timeline.validates(first_step) or checkpoints.is_validated(first_step)
        if first_step >= last_step and validated:
            _log.info("the run is complete: %d steps are done", first_step)
            return

        # What frozen encoders make of the data, once for all steps, where it is kept.
        tokens = model.tokenize(train.captions, config.data.text_length)
        if config.data.keep_frozen:
            whole = model.with_params(state.all_params)
            train = whole.with_kept(train, tokens, training=True)
            val = whole.with_kept(val, model.tokenize(val.captions, config.evaluation.text_length))
            del whole  # its parameters may be the state's own, which is donated

        # What watches over the run.
        supervisor = Supervisor(
            config=config,
            timeline=timeline,
            last_step=last_step,
            model=model,
            val=val,
            checkpoints=checkpoints,
            log=MetricLog(
                workdir, first_step, validated, open_trackers(config, workdir, first_step)
            ),
            results=StepResults(order, train, position),
            stop=stop,
            profile=profiler(config.logging.profile_step, workdir),
        )
        if not validated:
            supervisor.validate_restored(state, first_step)

        # Loop. Each phase is compiled before a signal is held back, and before an hour of training
        # can be lost to a program of a later phase that does not fit the devices.
        steps = range(first_step, last_step)
        first_batch, batches = peeked(batches_of(config, train, tokens, order, steps, mesh))
        phases = {timeline.phase(step) for step in steps}
        compiled = compile_phases(jitted, phases, state, first_batch, mesh, known.tables)
        clock = DataClock(batches)
        with stop, training_progress(config, steps) as progress:
            for step, batch in enumerate(clock, start=first_step):
                phase = timeline.phase(step)
                if step == first_step or phase is not timeline.phase(step - 1):
                    _log.info("step %d: %s", step, phase.value)
                # The mark tells the profiler which step a program that runs later belongs to.
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    # Nothing but the batch is copied to the devices, which would stall every step.
                    rows = sharding.to_devices(batch, mesh)
                    with jax.transfer_guard_host_to_device("disallow"):
                        state, scalars, negatives = compiled[phase](state, rows, *known.tables)
                supervisor.after_step(state, scalars, negatives, step + 1, clock, progress)
            supervisor.finish()
        _log.info("the run is complete: %d steps", last_step)


def _load(config, mesh):
    """Returns the training and the validation split, and what is known of further matches."""
    with processes.first_process_first("data"):
        train = load_split(config.data, config.encoder.image.image_size, "train")
        val = load_evaluation_split(config, "val")
    with processes.failing_together("config.data.matches"):
        return train, val, known_matches(config, train, mesh)


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
    """Returns clu's profiler of five steps, which writes for TensorBoard, or what does nothing."""
    if not profile_step or jax.process_index() != 0:
        return lambda step: None
    from clu import periodic_actions

    return periodic_actions.Profile(
        logdir=str(workdir),
        num_profile_steps=5,
        first_profile=profile_step,
        # By default clu profiles three seconds at least, and again in every hour.
        profile_duration_ms=None,
        every_secs=None,
    )

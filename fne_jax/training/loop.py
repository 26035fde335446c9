"""A training run from its config to its last checkpoint."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from fne_jax import configuration
from fne_jax.data.batches import BatchOrder, training_batches
from fne_jax.data.pairs import (
    PairDataset,
    load_split,
    with_captions_per_image,
)
from fne_jax.encoders.towers import read_architectures, store_architectures, with_model_defaults
from fne_jax.errors import Interrupted, UserError
from fne_jax.parallel import processes, sharding
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.report.tensorboard import statistics_images
from fne_jax.retrieval.evaluation import evaluate_split
from fne_jax.training import checkpointing, run
from fne_jax.training.bad_steps import BadSteps
from fne_jax.training.compiled_steps import compiled_steps
from fne_jax.training.data_clock import DataClock
from fne_jax.training.interruption import Stopped, StopRequest
from fne_jax.training.metric_log import EVALUATED, MetricLog, ScalarWindow
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.phases import RunPlan
from fne_jax.training.progress import TrainingProgress
from fne_jax.training.step_results import settle

_log = logging.getLogger(__name__)


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, *, warmup_only: bool = False
) -> None:
    """Trains, validates and checkpoints a run; resumes the one that the workdir holds.

    Args:
      config: see configs/base.py.
      workdir: folder of the run; see README.md for what it holds afterwards.
      warmup_only: stop, saved, where the warm-up ends, for runs that go on from there in copies of
        the folder.

    Raises:
      UserError: on wrong input, when too many steps in a row had no finite loss or gradient, or
        when a checkpoint cannot be written.
      Interrupted: after Ctrl-C or SIGTERM, with everything saved.
    """
    # Data: everything that may be wrong with it shows before the workdir is touched.
    architectures = read_architectures(config.encoder, workdir)
    config = with_model_defaults(config, architectures)
    use_compile_cache(config.compile_cache)
    image_size = config.encoder.image.image_size
    with processes.first_process_first("data"):
        train = load_split(config.data, image_size, "train")
        val = with_captions_per_image(
            load_split(config.data, image_size, "val"), config.evaluation.captions_per_image
        )
    order = batch_order(config, train)
    plan = RunPlan.of(config, order.steps_per_epoch)
    last_step = min(plan.fne_start_step, plan.total_steps) if warmup_only else plan.total_steps
    _log.info(
        "data: %d training pairs, %d steps an epoch, %d in all; FNE from step %d",
        len(train.captions),
        plan.steps_per_epoch,
        plan.total_steps,
        plan.fne_start_step,
    )

    # Workdir.
    with processes.first_process_first("workdir"):
        create_workdir(workdir)
        require_shared(workdir)
        configuration.store_config(config, workdir)
        store_architectures(architectures, workdir)
        tokenizer = run.run_tokenizer(config, workdir, train)
    tokenize = functools.partial(run.tokenize_captions, config, tokenizer)
    train_tokens = tokenize(train.captions, config.data.text_length)
    val_tokens = tokenize(val.captions, config.evaluation.text_length)

    # Mesh, model, optimizer, state.
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp)
    module = run.build_module(config, architectures, len(tokenizer))
    schedule = learning_rate_schedule(config.optimizer, plan.steps_per_epoch, plan.total_steps)
    state = run.initial_state(config, module, mesh, schedule)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    _log.info("model: %.1f M parameters on %d devices", count / 1e6, mesh.size)

    # Restore.
    manager = checkpointing.checkpoint_manager(workdir, config.checkpoint)
    position: dict[str, Any] = {}
    restored = checkpointing.restore_newest(manager, state)
    if restored is not None:
        latest, state, position = restored
        _log.info("resumed from step %d of %s", latest, workdir)
    elif config.init_from:
        state = run.with_weights_of(state, pathlib.Path(config.init_from))
    else:
        state = run.with_pretrained_towers(state, config.encoder)
    first_step = int(state.step)
    # A signal may have come before or during the validation of a step that was then saved.
    validated = first_step not in plan.validation_steps or manager.metrics(first_step) is not None
    if first_step >= last_step and validated:
        _log.info("the run is complete: %d steps are done", first_step)
        return

    # What a run counts and shows.
    stop = StopRequest()
    embedder = run.build_embedder(config, module, mesh, before_batch=stop.check)
    log = MetricLog(workdir, first_step, validated)
    window = ScalarWindow(position.get("window"))
    bad_steps = BadSteps.of(position.get("bad_steps"))

    def validate(step: int) -> dict[str, float] | None:
        """Returns the metrics, or None if a signal came first."""
        try:
            metrics, samples = evaluate_split(embedder, state.params, val, val_tokens)
        except Stopped:
            return None
        log.write(step, {f"{EVALUATED}{name}": value for name, value in metrics.items()})
        log.write_histograms(step, {f"similarity_{k}": v for k, v in samples.items()})
        log.write_images(step, functools.partial(statistics_images, state.stats, config.fne))
        _log.info("step %d: validation rSum %.1f", step, metrics["rsum"])
        return metrics

    def save(metrics: dict[str, float] | None = None) -> None:
        position = {"window": window.stored(), "bad_steps": bad_steps.stored()}
        checkpointing.save(manager, state, position, metrics)

    def finish() -> None:
        checkpointing.finish(manager)
        log.flush()

    def interrupted(step: int) -> Interrupted:
        return Interrupted(
            stop.poll(), f"stopped at step {step}, saved; the same command goes on from there"
        )

    if not validated:
        with stop:
            metrics = validate(first_step)
        if metrics is None:
            finish()
            raise interrupted(first_step)
        checkpointing.add_metrics(manager, first_step, metrics)

    # Loop.
    batches = training_batches(
        train,
        train_tokens,
        order,
        range(first_step, last_step),
        image_size=image_size,
        augmentation=config.data.augmentation,
        augment_on=config.data.augment_on,
        process=jax.process_index(),
        processes=jax.process_count(),
        prefetch=config.data.prefetch,
    )
    # Compiled before a signal is held back, and before an hour of training can be lost to a program
    # of a later phase that does not fit the devices.
    first_batch = next(batches, None)
    steps = {}
    if first_batch is not None:
        phases = {plan.phase(step) for step in range(first_step, last_step)}
        steps = compiled_steps(config, plan, phases, mesh, schedule, state, first_batch)
        batches = itertools.chain([first_batch], batches)
    clock = DataClock(batches)
    progress = TrainingProgress(
        first_step, last_step, config.global_batch_size, config.logging.progress_seconds
    )
    hooks = profile_hooks(config.logging.profile_step, workdir)
    pending = collections.deque()  # steps that may still be running, with their results
    phase = None
    with stop, contextlib.closing(progress):
        for step, batch in enumerate(clock, start=first_step):
            if plan.phase(step) is not phase:
                phase = plan.phase(step)
                _log.info("step %d: %s", step, phase.value)
            # Nothing but the batch is copied to the devices, which would stall every step.
            rows = sharding.to_devices(batch, mesh)
            with jax.transfer_guard_host_to_device("disallow"):
                state, scalars, negatives = steps[phase](state, rows)
            pending.append((step, scalars, negatives))
            done = step + 1
            logs = done % config.logging.every_steps == 0 or done == plan.total_steps
            validates = done in plan.validation_steps
            saves = config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0
            saves |= done == last_step
            stops = stop.poll() is not None
            # Two steps stay in flight, enough to keep the device busy and memory bounded.
            settle_all = logs or validates or saves or stops
            while len(pending) > (0 if settle_all or bad_steps.in_a_row else 2):
                settle(window, bad_steps, *pending.popleft(), order, train)
            for hook in hooks:
                hook(done)
            means = {}
            if logs:
                means = window.take_means()
                rates = clock.take_rates(config.global_batch_size)
                log.write(done, means | {"bad_steps": bad_steps.total} | rates)
                checkpointing.check(manager)
            progress.update(done, means.get("loss"), clock.waiting_share)
            if bad_steps.in_a_row >= config.max_bad_steps:
                in_a_row, bad_steps.in_a_row = bad_steps.in_a_row, 0  # for the next try
                save()
                finish()
                raise UserError(
                    f"the last {in_a_row} steps to step {done} had a loss or gradient that is no "
                    "finite number (config.max_bad_steps); the state before them is saved. Look at "
                    "their pairs in the log, or begin anew with a lower "
                    "config.optimizer.learning_rate"
                )
            if validates:
                with clock.paused():
                    metrics = validate(done)
                save(metrics)
                stops = metrics is None or (stops and done < last_step)
            elif saves or stops:
                save()
            if stops:
                finish()
                raise interrupted(done)
        finish()
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


def create_workdir(workdir: pathlib.Path) -> None:
    """Creates the folder.

    Raises:
      UserError: if it cannot be created or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".write_test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written to: {error}") from error


def require_shared(workdir: pathlib.Path) -> None:
    """Raises UserError on a process that does not see the workdir that process 0 has begun."""
    if jax.process_index() != 0 and not (workdir / configuration.FILE_NAME).exists():
        raise UserError(
            f"--workdir={workdir}: process {jax.process_index()} does not find there what process "
            "0 wrote; give a folder on a file system that all processes share"
        )


def profile_hooks(profile_step: int, workdir: pathlib.Path) -> list[Callable[[int], None]]:
    """Returns clu's profiler, which writes for TensorBoard, if the config asks for it."""
    if not profile_step or jax.process_index() != 0:
        return []
    from clu import periodic_actions

    return [
        periodic_actions.Profile(
            logdir=str(workdir), num_profile_steps=5, first_profile=profile_step
        )
    ]

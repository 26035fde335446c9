"""A training run from its config to its last checkpoint."""

from __future__ import annotations

import functools
import itertools
import logging
import pathlib

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from fne_jax.data.pairs import few_images
from fne_jax.errors import Interrupted, UserError
from fne_jax.evaluation.metric_names import WARMUP
from fne_jax.evaluation.results import score_split
from fne_jax.logs import warn_once
from fne_jax.parallel import sharding
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.progress import Progress
from fne_jax.report.figures import statistics_images
from fne_jax.training import workdir as run_folder
from fne_jax.training.checkpointing import Checkpoints
from fne_jax.training.interruption import Stopped, StopRequest
from fne_jax.training.metric_log import EVALUATED, MetricLog
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.setup import RunSetup
from fne_jax.training.step_results import DataClock, StepResults
from fne_jax.training.timeline import Phase, Timeline
from fne_jax.training.train_state import TrainState, first_state
from fne_jax.training.wandb_log import WandbLog

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
        _prepare_and_train(config, workdir, warmup_only, module)


def _prepare_and_train(config, workdir, warmup_only, module):
    use_compile_cache(config.compile_cache)
    stop = StopRequest()
    run = RunSetup.of(config, workdir, module=module, before_batch=stop.check)
    training, timeline = run.training, run.training.timeline
    last_step = timeline.warmup_end if warmup_only else timeline.total_steps
    _tell(run, warmup_only)
    state = None if run.begun else first_state(training.model, training.state)

    # Nothing is written before here, where all that may be wrong has shown.
    with run_folder.held(workdir):
        run_folder.begin(workdir, training.model, run.architectures, run.data, begun=run.begun)
        checkpoints, position = Checkpoints(workdir, training.model.config.checkpoint), {}
        if run.begun:
            state, position = checkpoints.restore_newest(training.state)
            _log.info("resumed from step %d of %s", int(state.step), workdir)
        _train(run, workdir, last_step, state, position, checkpoints, stop)
        _log.info("the run is complete: %d steps are done", last_step)


def doubts(config: ml_collections.ConfigDict, timeline: Timeline) -> list[str]:
    """Returns, a line each, what a run will hardly have been meant to do.

    Args:
      config: The resolved config.
      timeline: Its step counts.
    """
    fne, total, start = config.fne, timeline.total_steps, timeline.fne_start_step
    if start >= total:
        return [
            "the run ends within the warm-up, without any step of config.objective: "
            f"config.fne.start_epoch is {fne.start_epoch}, config.num_epochs {config.num_epochs}"
        ]
    found = []
    schedule = learning_rate_schedule(config.optimizer, timeline.steps_per_epoch, total)
    rates = np.array([schedule(step) for step in np.linspace(0, total - 1, min(total, 1000))])
    share = rates[round(len(rates) * start / total) :].sum() / rates.sum()
    if start and share < 0.1:
        found.append(
            f"config.objective.name={config.objective.name} acts on {100 * share:.1f} % of the "
            f"run's learning rate, from step {start} of {total} on: config.optimizer.schedule is "
            f"{config.optimizer.schedule} and config.fne.start_epoch {fne.start_epoch}"
        )
    # Each batch adds a pair at most for each of its anchors, and old ones are forgotten.
    if fne.ema_decay < 1:
        most = round(config.global_batch_size / (1 - fne.ema_decay), 3)
    else:
        most = config.global_batch_size * timeline.steps_per_epoch
    if config.objective.name == "fne" and most <= fne.min_count:
        found.append(
            f"nothing is ever suspected: config.fne.min_count is {fne.min_count}, and with "
            f"config.fne.ema_decay={fne.ema_decay} and {config.global_batch_size} pairs a batch "
            f"no more than {most:.0f} similarities count at a time"
        )
    return found


def _tell(run, warmup_only):
    """Logs what the run is, and what it will hardly have been meant to do."""
    config, timeline, state = run.training.model.config, run.training.timeline, run.training.state
    pairs = run.order.pairs - len(run.order.left_out), len(run.val.captions)
    _log.info("data: %d training pairs, %d for validation, %s", *pairs, timeline)
    warn_once(_log, few_images("val", len(run.val.image_id)))
    for doubt in () if warmup_only else doubts(config, timeline):
        _log.warning("%s", doubt)
    trained, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
        for params in (state.params, state.frozen_params)
    )
    share = f", {frozen:.1f} M of them frozen" if frozen else ""
    devices = run.training.model.mesh.size
    _log.info("model: %.1f M parameters%s, devices: %d", trained + frozen, share, devices)


def _train(run, workdir, last_step, state, position, checkpoints, stop):
    """Trains a new or restored state to its last step."""
    config, mesh = run.training.model.config, run.training.model.mesh
    timeline, first_step = run.training.timeline, int(state.step)
    # A signal may have come before or during the validation of a step that was then saved.
    validated = not timeline.validates(first_step) or checkpoints.is_validated(first_step)
    if first_step >= last_step and validated:
        return
    tokens = run.training.model.tokenize_split(run.train, config.data.text_length)
    warn_once(_log, run.training.model.unread(run.train.captions, tokens))
    # What frozen encoders make of the data, once for all steps, where it is kept.
    run = run.with_kept(state.all_params, tokens)
    steps = range(first_step, last_step)
    # Each phase is compiled before a signal is held back, and before an hour of training can be
    # lost to a program of a later phase that does not fit the devices.
    compiled = run.training.compiled({timeline.phase(step) for step in steps}, run.known)
    log = MetricLog(workdir, first_step, validated, WandbLog(config, workdir, first_step))
    results = StepResults(run.order, run.train, position)
    clock = DataClock(run.batches(tokens, steps), config.global_batch_size)
    profile = _profiler(config.logging.profile_step, workdir)

    progress = Progress(
        "train",
        last_step,
        completed=first_step,
        every_seconds=config.logging.progress_seconds,
        enabled=jax.process_index() == 0,
    )

    def saves(step):
        every = config.checkpoint.every_steps
        return step == last_step or (every > 0 and step % every == 0)

    def finish():
        """Waits until everything is on disk."""
        checkpoints.finish()
        log.close()

    stops = False
    with stop, progress:
        for step in itertools.count(first_step):
            # Evaluate and save; what was restored is saved already, but maybe not validated.
            metrics = None
            validates = timeline.validates(step) if step > first_step else not validated
            if validates:
                with clock.paused():
                    metrics = validate(run, state, step, log)
                stops = metrics is None or (stops and step < last_step)
            if validates or stops or (step > first_step and saves(step)):
                checkpoints.save(state.stored(), results.stored(), metrics)
            if stops:
                finish()
                raise Interrupted(
                    stop.poll(),
                    f"stopped at step {step}, saved; the same command goes on from there",
                )
            if step >= last_step:
                break

            # Read and step.
            batch = next(clock)
            phase = timeline.phase(step)
            if step == first_step or phase is not timeline.phase(step - 1):
                objective = config.objective.name if phase is Phase.FNE else phase.value
                _log.info("step %d: %s", step, objective)
            # The mark tells the profiler which step a program that runs later belongs to.
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                # Nothing but the batch is copied to the devices, which would stall every step.
                rows = sharding.to_devices(batch, mesh)
                with jax.transfer_guard_host_to_device("disallow"):
                    state, scalars, negatives = compiled[phase](state, rows, *run.known)

            # Write; nothing waits for the step itself unless it must.
            done = step + 1
            results.add(step, scalars, negatives)
            # No mean is taken over losses of the warm-up and of what follows it.
            ends = done in (timeline.warmup_end, timeline.total_steps)
            logs = ends or done % config.logging.every_steps == 0
            stops = stop.poll() is not None
            if logs or stops or timeline.validates(done) or saves(done):
                results.settle()
            profile(done)
            if logs:
                counts = {"bad_steps": results.bad_steps}
                counts[WARMUP] = float(done <= timeline.warmup_end)
                log.write(done, results.take_means() | counts | clock.take_rates())
                checkpoints.check()
            loss = "" if results.last_loss is None else f"loss {results.last_loss:.4f}  "
            progress.update(done, f"{loss}{clock}")
            if results.bad_in_a_row >= config.max_bad_steps:
                in_a_row, results.bad_in_a_row = results.bad_in_a_row, 0  # for the next try
                checkpoints.save(state.stored(), results.stored())
                finish()
                raise UserError(
                    f"the last {in_a_row} steps to step {done} had a loss or gradient that is no "
                    "finite number (config.max_bad_steps); the state before them is saved. Look at "
                    "their pairs in the log, or start again with a lower "
                    "config.optimizer.learning_rate"
                )
        finish()


def validate(
    run: RunSetup, state: TrainState, step: int, log: MetricLog
) -> dict[str, float] | None:
    """Returns the metrics of the validation split, written down, or None if a signal came first."""
    model = run.training.model
    try:
        split = model.with_params(state.all_params).embed_split(run.val)
    except Stopped:
        return None
    metrics, samples = score_split(split)
    log.write(step, {f"{EVALUATED}{name}": value for name, value in metrics.items()})
    log.write_histograms(step, {f"similarity_{k}": v for k, v in samples.items()})
    log.write_images(step, functools.partial(statistics_images, state.stats, model.config.fne))
    _log.info("step %d: validation rSum %.1f", step, metrics["rsum"])
    return metrics


def _profiler(profile_step, workdir):
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

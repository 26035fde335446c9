"""A training run from its config to its last checkpoint."""

from __future__ import annotations

import collections
import functools
import logging
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from fne_jax import configuration
from fne_jax.command_line import Interrupted
from fne_jax.data import device_augmentation
from fne_jax.data.datasets import (
    KnownTruth,
    PairDataset,
    load_split,
    with_captions_per_image,
)
from fne_jax.data.input_pipeline import BatchOrder, training_batches
from fne_jax.encoders.towers import read_architectures, store_architectures, with_model_defaults
from fne_jax.errors import UserError
from fne_jax.report.tensorboard import statistics_images
from fne_jax.retrieval.evaluation import evaluate_split
from fne_jax.training import checkpointing, objective, run, sharding
from fne_jax.training.interruption import StopRequest
from fne_jax.training.metric_log import MetricLog, ScalarWindow
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.phases import Phase, RunPlan
from fne_jax.training.progress import TrainingProgress
from fne_jax.training.train_step import given_pixels, train_step

_log = logging.getLogger(__name__)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Trains, validates and checkpoints a run; resumes the one that the workdir holds.

    Args:
      config: see configs/base.py.
      workdir: folder of the run; see README.md for what it holds afterwards.

    Raises:
      UserError: on wrong input, or when the loss is no longer a number.
      Interrupted: after Ctrl-C or SIGTERM, with everything saved.
    """
    # Data: everything that may be wrong with it shows before the workdir is touched.
    architectures = read_architectures(config.encoder, workdir)
    config = with_model_defaults(config, architectures)
    image_size = config.encoder.image.image_size
    train = load_split(config.data, image_size, "train")
    val = with_captions_per_image(
        load_split(config.data, image_size, "val"), config.evaluation.captions_per_image
    )
    order = batch_order(config, train)
    plan = RunPlan.of(config, order.steps_per_epoch)
    _log.info(
        "data: %d training pairs, %d steps an epoch, %d in all; FNE from step %d",
        len(train.captions),
        plan.steps_per_epoch,
        plan.total_steps,
        plan.fne_start_step,
    )

    # Workdir.
    create_workdir(workdir)
    configuration.store_config(config, workdir)
    store_architectures(architectures, workdir)
    tokenizer = run.run_tokenizer(config, workdir, train)
    tokenize = functools.partial(run.tokenize_captions, config, tokenizer)
    train_tokens = tokenize(train.captions, config.data.text_length)
    val_tokens = tokenize(val.captions, config.evaluation.text_length)

    # Mesh, model, optimizer, state.
    mesh = sharding.create_mesh()
    module = run.build_module(config, architectures, len(tokenizer))
    schedule = learning_rate_schedule(config.optimizer, plan.steps_per_epoch, plan.total_steps)
    state = run.initial_state(config, module, mesh, schedule)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    _log.info("model: %.1f M parameters on %d devices", count / 1e6, mesh.size)

    # Restore.
    manager = checkpointing.checkpoint_manager(workdir, config.checkpoint)
    position: dict[str, Any] = {}
    latest = manager.latest_step()
    if latest is not None:
        state, position = checkpointing.restore(manager, latest, state)
        _log.info("resumed from step %d of %s", latest, workdir)
    elif config.init_from:
        state = run.with_weights_of(state, pathlib.Path(config.init_from))
    else:
        state = run.with_pretrained_towers(state, config.encoder)
    first_step = int(state.step)
    if first_step >= plan.total_steps:
        _log.info("the run is complete: %d steps are done", first_step)
        return

    # Jitted steps.
    steps = jitted_steps(config, plan, mesh, schedule)
    embedder = run.build_embedder(config, module, mesh)
    log = MetricLog(workdir, first_step)
    window = ScalarWindow(position.get("window"))

    def validate(step: int) -> dict[str, float]:
        metrics, samples = evaluate_split(embedder, state.params, val, val_tokens)
        log.write(step, {f"eval_{name}": value for name, value in metrics.items()})
        log.write_histograms(step, {f"similarity_{k}": v for k, v in samples.items()})
        log.write_images(step, functools.partial(statistics_images, state.stats, config.fne))
        _log.info("step %d: validation rSum %.1f", step, metrics["rsum"])
        return metrics

    def save(metrics: dict[str, float] | None = None) -> None:
        checkpointing.save(manager, state, {"window": window.stored()}, metrics)

    # Loop.
    batches = training_batches(
        train,
        train_tokens,
        order,
        range(first_step, plan.total_steps),
        image_size=image_size,
        augmentation=config.data.augmentation,
        augment_on=config.data.augment_on,
        process=jax.process_index(),
        processes=jax.process_count(),
        prefetch=config.data.prefetch,
    )
    clock = DataClock(batches)
    progress = TrainingProgress(
        first_step, plan.total_steps, config.global_batch_size, config.logging.progress_seconds
    )
    hooks = profile_hooks(config.logging.profile_step, workdir)
    pending = collections.deque()  # scalars of steps that may still be running
    phase = None
    with StopRequest() as stop:
        for step, batch in enumerate(clock, start=first_step):
            if plan.phase(step) is not phase:
                phase = plan.phase(step)
                _log.info("step %d: %s", step, phase.value)
            state, scalars, negatives = steps[phase](state, sharding.to_devices(batch, mesh))
            pending.append((scalars, negatives))
            done = step + 1
            logs = done % config.logging.every_steps == 0 or done == plan.total_steps
            validates = done in plan.validation_steps
            saves = config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0
            # Two steps stay in flight, enough to keep the device busy and memory bounded.
            settle_all = logs or validates or saves or stop.signal_number is not None
            while len(pending) > (0 if settle_all else 2):
                settle(window, *pending.popleft(), train)
            for hook in hooks:
                hook(done)
            if logs:
                means = window.take_means()
                log.write(done, means | clock.take_rates(config.global_batch_size))
                require_finite(means, done)
            progress.update(done, means["loss"] if logs else None, clock.waiting_share)
            if validates:
                with clock.paused():
                    save(validate(done))
            elif saves:
                save()
            if stop.signal_number is not None and done < plan.total_steps:
                save()
                manager.close()
                progress.close()
                log.flush()
                raise Interrupted(
                    stop.signal_number,
                    f"stopped at step {done}, saved; the same command goes on from there",
                )
    progress.close()
    manager.close()
    log.flush()
    _log.info("the run is complete: %d steps", plan.total_steps)


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


def jitted_steps(
    config: ml_collections.ConfigDict, plan: RunPlan, mesh: jax.sharding.Mesh, schedule
) -> dict[Phase, Callable]:
    """Returns the compiled-on-first-use train step of each phase, the state donated."""
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    shared = {
        "augment": augmentation_in_step(config),
        "momentum": config.momentum,
        "mask_same_image": config.fne.mask_same_image,
        "next_statistics": objective.next_statistics(config.fne, plan.steps_per_epoch),
        "image_mean": config.image_mean,
        "image_std": config.image_std,
        "learning_rate": schedule,
    }
    warmup, main = objective.warmup_objective(config), objective.main_objective(config)
    kinds = {
        Phase.WARMUP: {"objective": warmup, "write_queue": False},
        Phase.WARMUP_FILLING: {"objective": warmup, "write_queue": True},
        Phase.FNE: {"objective": main, "write_queue": True},
    }
    return {
        phase: jax.jit(
            functools.partial(train_step, **kind, **shared),
            in_shardings=(whole, rows),
            out_shardings=whole,
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


def settle(
    window: ScalarWindow, scalars: dict[str, Any], negatives: dict[str, Any], train: PairDataset
) -> None:
    """Waits for a step's results and adds them, with the true false-negative rates if known."""
    if train.truth is not None and negatives:
        scalars = scalars | true_false_negative_rates(
            train.truth, train.caption_image, jax.device_get(negatives)
        )
    window.add(scalars)


def true_false_negative_rates(
    truth: KnownTruth, caption_image: np.ndarray, negatives: dict[str, np.ndarray]
) -> dict[str, float]:
    """Returns the share of chosen, and of hardest, negatives that are in truth matches.

    Args:
      truth: of the training split.
      caption_image: [pairs] the image of each caption.
      negatives: [batch] pair ids, `anchor` and those that the train step names; -1 (an empty
        slot of the memory) is no match.
    """
    anchor = negatives["anchor"]
    rates = {}
    for kind in ("negative", "hardest"):
        texts, images = negatives[f"{kind}_i2t"], negatives[f"{kind}_t2i"]
        matches = np.concatenate(
            [
                truth.is_true(texts, caption_image[anchor]) & (texts >= 0),
                truth.is_true(anchor, caption_image[images]) & (images >= 0),
            ]
        )
        rates[f"{'sampled' if kind == 'negative' else kind}_false_negative_rate"] = matches.mean()
    return rates


def require_finite(means: dict[str, float], step: int) -> None:
    """Raises UserError if the loss or the gradient norm is no longer a number."""
    for name in ("loss", "gradient_norm"):
        if not np.isfinite(means[name]):
            raise UserError(
                f"{name} is {means[name]} at step {step}; lower config.optimizer.learning_rate or "
                "config.optimizer.clip_norm, and start from the last checkpoint"
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


class DataClock:
    """Iterates over batches and measures how long the loop waits for them."""

    def __init__(self, batches: Iterator[Any]):
        self._batches = iter(batches)
        self._started = self._window_started = time.monotonic()
        self._waited = self._window_waited = 0.0
        self._window_batches = 0

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches."""
        while True:
            before = time.monotonic()
            try:
                batch = next(self._batches)
            except StopIteration:
                return
            waited = time.monotonic() - before
            self._waited += waited
            self._window_waited += waited
            self._window_batches += 1
            yield batch

    @property
    def waiting_share(self) -> float:
        """Share of the time since the start spent waiting."""
        return self._waited / max(time.monotonic() - self._started, 1e-9)

    def paused(self):
        """Returns a context whose time does not count."""
        return _Pause(self)

    def take_rates(self, batch_size: int) -> dict[str, float]:
        """Returns pairs a second and the waiting share since the last call."""
        elapsed = max(time.monotonic() - self._window_started, 1e-9)
        rates = {
            "pairs_per_s": self._window_batches * batch_size / elapsed,
            "data_wait_share": self._window_waited / elapsed,
        }
        self._window_started = time.monotonic()
        self._window_waited, self._window_batches = 0.0, 0
        return rates

    def shift(self, seconds: float) -> None:
        """Leaves a span of time out of all rates."""
        self._started += seconds
        self._window_started += seconds


class _Pause:
    def __init__(self, clock: DataClock):
        self._clock = clock

    def __enter__(self):
        self._before = time.monotonic()

    def __exit__(self, *exception):
        self._clock.shift(time.monotonic() - self._before)

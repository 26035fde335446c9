"""What happens around the train step: log, validate, save, and stop in good order."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping

import jax
import ml_collections

from fne_jax.data.pairs import PairDataset
from fne_jax.errors import Interrupted, UserError
from fne_jax.evaluation.metric_names import WARMUP
from fne_jax.evaluation.results import score_split
from fne_jax.model.model import Model
from fne_jax.progress import Progress
from fne_jax.report.figures import statistics_images
from fne_jax.training.checkpointing import Checkpoints
from fne_jax.training.data_clock import DataClock
from fne_jax.training.interruption import Stopped, StopRequest
from fne_jax.training.metric_log import EVALUATED, MetricLog
from fne_jax.training.retrieved_images import retrieved_images
from fne_jax.training.step_results import StepResults
from fne_jax.training.timeline import Timeline
from fne_jax.training.train_state import TrainState

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Supervisor:
    """Decides after each step what is due, and does it.

    Attributes:
      config: The resolved config.
      timeline: The step counts of the run.
      last_step: The step at which this call ends, the run's last or that of its warm-up.
      model: The model that embeds the validation split; its parameters are the state's.
      val: The validation split.
      checkpoints: The checkpoints of the run.
      log: The metrics that the run writes down.
      results: The results of the steps since the last write.
      stop: Whether a signal asked the run to stop.
      profile: Called with the number of steps done; profiles those that the config asks for.
    """

    config: ml_collections.ConfigDict
    timeline: Timeline
    last_step: int
    model: Model
    val: PairDataset
    checkpoints: Checkpoints
    log: MetricLog
    results: StepResults
    stop: StopRequest
    profile: Callable[[int], None]

    def after_step(
        self,
        state: TrainState,
        scalars: Mapping[str, jax.Array],
        negatives: Mapping[str, jax.Array],
        done: int,
        clock: DataClock,
        progress: Progress,
    ) -> None:
        """Does what is due after a step; nothing waits for the step itself unless it must.

        Args:
          state: The state after the step.
          scalars: What the train step returned for the log.
          negatives: What it returned of its negatives.
          done: How many steps are done, this one included.
          clock: The time that the loop waited for data.
          progress: The display to be updated.

        Raises:
          UserError: when too many steps in a row were not applied, or a save failed.
          Interrupted: after a signal, with everything saved.
        """
        self.results.add(done - 1, scalars, negatives)
        logs = done % self.config.logging.every_steps == 0
        # No mean is taken over losses of the warm-up and of what follows it.
        logs |= done in (self.timeline.warmup_end, self.timeline.total_steps)
        validates = self.timeline.validates(done)
        saves = done == self.last_step or _is_due(done, self.config.checkpoint.every_steps)
        stops = self.stop.poll() is not None
        if logs or validates or saves or stops:
            self.results.settle()
        self.profile(done)
        if logs:
            self._write_means(done, clock)
        self._show(done, clock, progress)
        if self.results.bad_in_a_row >= self.config.max_bad_steps:
            self._give_up(state, done)
        if validates:
            with clock.paused():
                metrics = self.validate(state, done)
            self._save(state, metrics)
            stops = metrics is None or (stops and done < self.last_step)
        elif saves or stops:
            self._save(state)
        if stops:
            self._stop_at(done)

    def validate(self, state: TrainState, step: int) -> dict[str, float] | None:
        """Returns the metrics of the validation split, or None if a signal came first."""
        try:
            split = self.model.with_params(state.all_params).embed_split(self.val)
        except Stopped:
            return None
        metrics, samples = score_split(split)
        self.log.write(step, {f"{EVALUATED}{name}": value for name, value in metrics.items()})
        self.log.write_histograms(step, {f"similarity_{k}": v for k, v in samples.items()})
        render = functools.partial(statistics_images, state.stats, self.config.fne)
        self.log.write_images(step, render)
        self.log.write_images(step, lambda: {"gallery": retrieved_images(split)})
        _log.info("step %d: validation rSum %.1f", step, metrics["rsum"])
        return metrics

    def validate_restored(self, state: TrainState, step: int) -> None:
        """Validates a checkpoint that was saved before its validation had ended.

        Raises:
          Interrupted: if a signal came again.
        """
        with self.stop:
            metrics = self.validate(state, step)
        if metrics is None:
            self._stop_at(step)
        self.checkpoints.add_metrics(step, metrics)

    def finish(self) -> None:
        """Waits until everything is on disk."""
        self.checkpoints.finish()
        self.log.close()

    def _write_means(self, done, clock):
        means = self.results.take_means()
        rates = clock.take_rates(self.config.global_batch_size)
        progress = {
            "bad_steps": self.results.bad_steps,
            WARMUP: float(done <= self.timeline.warmup_end),
        }
        self.log.write(done, means | progress | rates)
        self.checkpoints.check()

    def _show(self, done, clock, progress):
        last_loss = self.results.last_loss
        loss = "" if last_loss is None else f"loss {last_loss:.4f}  "
        rate = clock.batches_per_second * self.config.global_batch_size
        note = f"{loss}{rate:.0f} pairs/s  waiting for data {clock.waiting_share:.0%}"
        progress.update(done, note)

    def _save(self, state, metrics=None):
        self.checkpoints.save(state, self.results.stored(), metrics)

    def _stop_at(self, step):
        self.finish()
        raise Interrupted(
            self.stop.poll(), f"stopped at step {step}, saved; the same command goes on from there"
        )

    def _give_up(self, state, done):
        in_a_row, self.results.bad_in_a_row = self.results.bad_in_a_row, 0  # for the next try
        self._save(state)
        self.finish()
        raise UserError(
            f"the last {in_a_row} steps to step {done} had a loss or gradient that is no finite "
            "number (config.max_bad_steps); the state before them is saved. Look at their pairs in "
            "the log, or begin anew with a lower config.optimizer.learning_rate"
        )


def _is_due(done, every):
    return every > 0 and done % every == 0

"""The step counts of a run: its epochs, phases and validations."""

from __future__ import annotations

import dataclasses
import enum
import math

import ml_collections

from fne_jax.errors import UserError

_MOST_STEPS = 2**31 - 1  # the train state counts them in int32


class Phase(enum.Enum):
    """What a step does."""

    WARMUP = "warm-up"
    WARMUP_FILLING = "warm-up, filling the queue"
    FNE = "the config's objective"


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The step counts of a run.

    Attributes:
      steps_per_epoch: The updates in an epoch.
      total_steps: The updates in the run.
      fne_start_step: The first step after the warm-up.
      filling_start_step: The first warm-up step that writes the queue. `infonce` uses it
        throughout; other warm-ups do not read it, so it is written only just before it is needed.
      validation_interval: The updates between validations, not necessarily a whole number.
    """

    steps_per_epoch: int
    total_steps: int
    fne_start_step: int
    filling_start_step: int
    validation_interval: float

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, steps_per_epoch: int) -> Timeline:
        """Returns the timeline of a config over a dataset.

        Raises UserError if an epoch that the config names lies beyond the last step that is
        counted.
        """
        epochs = {
            "num_epochs": config.num_epochs,
            "optimizer.warmup_epochs": config.optimizer.warmup_epochs,
            "optimizer.step_epochs": max(config.optimizer.step_epochs, default=0),
        }
        for name, value in epochs.items():
            if value * steps_per_epoch > _MOST_STEPS:
                raise UserError(
                    f"config.{name} is {value}; with {steps_per_epoch} steps an epoch expected at "
                    f"most {_MOST_STEPS // steps_per_epoch}"
                )
        total = max(round(config.num_epochs * steps_per_epoch), 1)
        fne_start = round(config.fne.start_epoch * steps_per_epoch)
        filling = 0
        if config.warmup.objective != "infonce":
            batches = math.ceil(config.queue_size / config.global_batch_size)
            batches *= config.warmup.fill_queue
            filling = max(fne_start - batches, 0)
        return cls(
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            fne_start_step=fne_start,
            filling_start_step=filling,
            validation_interval=steps_per_epoch / config.evaluation.per_epoch,
        )

    def validates(self, step: int) -> bool:
        """Returns whether the run is validated after `step` updates, as it is after the last.

        The n-th validation follows n intervals, rounded to a whole step.
        """
        nearest = round(step / self.validation_interval)
        numbers = range(max(nearest - 1, 1), nearest + 2)  # the neighbours where rounding ties
        regular = any(round(n * self.validation_interval) == step for n in numbers)
        return step == self.total_steps or (0 < step < self.total_steps and regular)

    def phase(self, step: int) -> Phase:
        """Returns the phase of the step that follows `step` updates."""
        if step >= self.fne_start_step:
            return Phase.FNE
        return Phase.WARMUP_FILLING if step >= self.filling_start_step else Phase.WARMUP

    @property
    def warmup_end(self) -> int:
        """The number of steps of the warm-up, or of the run if that ends before."""
        return min(self.fne_start_step, self.total_steps)

    def __str__(self) -> str:
        return (
            f"{self.steps_per_epoch} steps an epoch, {self.total_steps} in all, "
            f"{self.warmup_end} of them warm-up"
        )

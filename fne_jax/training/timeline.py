"""The step counts of a run: its epochs, phases and validations."""

from __future__ import annotations

import dataclasses
import enum
import math

import ml_collections


class Phase(enum.Enum):
    """What a step does."""

    WARMUP = "warm-up"
    WARMUP_FILLING = "warm-up, filling the queue"
    FNE = "false negative elimination"


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The step counts of a run.

    Attributes:
      steps_per_epoch: The updates in an epoch.
      total_steps: The updates in the run.
      fne_start_step: The first step after the warm-up.
      filling_start_step: The first warm-up step that writes the queue. `infonce` uses it
        throughout; other warm-ups do not read it, so it is written only just before it is needed.
      validation_steps: The numbers of updates after which the run is validated; the last step is
        one of them.
    """

    steps_per_epoch: int
    total_steps: int
    fne_start_step: int
    filling_start_step: int
    validation_steps: frozenset[int]

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, steps_per_epoch: int) -> Timeline:
        """Returns the timeline of a config over a dataset."""
        total = max(round(config.num_epochs * steps_per_epoch), 1)
        fne_start = round(config.fne.start_epoch * steps_per_epoch)
        filling = 0
        if config.warmup.objective != "infonce":
            batches = math.ceil(config.queue_size / config.global_batch_size)
            batches *= config.warmup.fill_queue
            filling = max(fne_start - batches, 0)
        between = steps_per_epoch / config.evaluation.per_epoch
        regular = (round(n * between) for n in range(1, math.ceil(total / between) + 1))
        return cls(
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            fne_start_step=fne_start,
            filling_start_step=filling,
            validation_steps=frozenset({s for s in regular if 0 < s <= total} | {total}),
        )

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
            f"{self.steps_per_epoch} steps an epoch, {self.total_steps} in all; FNE from step "
            f"{self.fne_start_step}"
        )

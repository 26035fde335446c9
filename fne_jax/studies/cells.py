"""What a study compares: objectives and variants of a config, each over several seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Sequence

import ml_collections

from fne_jax import configuration
from fne_jax.errors import UserError

# What each objective changes in the config.
OBJECTIVES = {
    "fne": ("objective.name=fne",),
    "hardest": ("objective.name=hardest",),
    "semi_hard": ("objective.name=semi_hard",),
    "random": ("objective.name=random",),
    "infonce": ("objective.name=infonce",),
    "sigmoid": ("objective.name=sigmoid",),
    "fne_no_memory": ("objective.name=fne", "objective.memory=False"),
    "fne_no_elimination": ("objective.name=fne", "fne.elimination=none"),
    "fne_no_cutdown": ("objective.name=fne", "fne.cut_down=False"),
}
# Fields that the warm-up does not depend on (the margin only where it mines the hardest negative).
_AFTER_WARMUP = (
    "objective.",
    "fne.margin",
    "fne.decay",
    "fne.prior",
    "fne.posterior_threshold",
    "fne.min_count",
    "fne.elimination",
    "fne.cut_down",
    "fne.monotone",
    "fne.key_chunk",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
      objective: A key of `OBJECTIVES`.
      variant: What else is changed, as `--vary` had it; "" for nothing.
    """

    objective: str
    variant: str = ""

    @property
    def name(self) -> str:
        """What the table and the folders call it."""
        return f"{self.objective} {self.variant}" if self.variant else self.objective

    def baseline(self, study_baseline: str) -> Cell:
        """Returns what it is compared with: the baseline in the same variant.

        The baseline itself is compared with what it is without the variant.
        """
        if self.objective == study_baseline:
            return Cell(study_baseline)
        return Cell(study_baseline, self.variant)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
      cell: The cell that it belongs to.
      seed: Its number among the cell's runs, and `config.seed`.
      config: The config, complete, as `train` would take it.
      workdir: Its folder.
      warmup: The folder of the warm-up that it shares with other runs; None for a run without one.
      warmup_config: The config that the warm-up is trained with.
    """

    cell: Cell
    seed: int
    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    warmup: pathlib.Path | None
    warmup_config: ml_collections.ConfigDict


def study_runs(
    config_path: str,
    overrides: Sequence[str],
    objectives: Sequence[str],
    variants: Sequence[str],
    seeds: int,
    workdir: pathlib.Path,
) -> list[Run]:
    """Returns the runs of a study, those of the first seed first.

    Each objective is run as it is and in each variant. Runs of one seed whose configs differ only
    in what follows the warm-up share that.

    Args:
      config_path: The config file.
      overrides: Changes that hold for all runs, as `--config.x=y`.
      objectives: Keys of `OBJECTIVES`.
      variants: Each `field=value`, or several of these with commas between.
      seeds: The number of runs of each cell.
      workdir: The folder of the study.

    Raises:
      UserError: if an objective is unknown or named twice, or a config is wrong.
    """
    for name in objectives:
        if name not in OBJECTIVES:
            raise UserError(
                f"--objectives: there is no {name!r}; expected some of {', '.join(OBJECTIVES)}"
            )
    cells = [Cell(name, variant) for variant in ("", *variants) for name in objectives]
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError("--objectives, --vary: one of them is given twice")
    runs = []
    for seed in range(seeds):
        for cell in cells:
            changes = _assignments(cell.variant)
            common = [*overrides, *(f"--config.{change}" for change in changes)]
            common.append(f"--config.seed={seed}")
            chosen = [f"--config.{change}" for change in OBJECTIVES[cell.objective]]
            config = _completed(configuration.load_config(config_path, [*common, *chosen]))
            after = tuple(_after_warmup(config))
            before = [o for o in common if not o.removeprefix("--config.").startswith(after)]
            warmup_config = _completed(configuration.load_config(config_path, before))
            runs.append(
                Run(
                    cell,
                    seed,
                    config,
                    workdir / _folder(cell.name) / f"seed{seed}",
                    _warmup_folder(workdir, warmup_config),
                    warmup_config,
                )
            )
    return runs


def _assignments(variant):
    changes = [change.strip() for change in variant.split(",")] if variant else []
    for change in changes:
        field, equals, value = change.partition("=")
        if not (field and equals and value):
            raise UserError(
                f"--vary={variant}: expected field=value, as in --vary=fne.prior=0.1, or several "
                "of these with commas between"
            )
        if field == "seed":
            raise UserError("--vary=seed=...: give the number of --seeds instead")
    return changes


def _completed(config):
    return configuration.resolve(config)[0]


def _after_warmup(config):
    for field in _AFTER_WARMUP:
        if field != "fne.margin" or config.warmup.objective != "hardest":
            yield field


def _folder(name):
    return re.sub(r"[^A-Za-z0-9_.=,+-]", "_", name)


def _warmup_folder(workdir, config):
    if not config.fne.start_epoch:
        return None
    # The same for all that may change from start to start.
    fields = {
        name: value
        for name, value in configuration.flatten(config).items()
        if not name.startswith(configuration.MAY_CHANGE)
    }
    digest = hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()
    return workdir / "warmups" / digest[:12]

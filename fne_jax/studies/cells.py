"""The runs of a study: objectives and variants of a config, each with several seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Container, Sequence

import ml_collections

from fne_jax import configuration
from fne_jax.errors import UserError
from fne_jax.objectives import registry
from fne_jax.studies import match_lists
from fne_jax.studies.match_lists import MatchList

# The matches that the training split's truth tells, in place of a list.
TRUTH = "truth"
# An objective, what finds its matches, and whose finished run: `multi_positive:fitted5000@clip`.
_FROM, _BY = ":", "@"
# What sorts the pairs of a list: nothing to a run without one.
_OF_LISTS = frozenset({"data.matches_negative", "data.matches_positive"})
# What each objective, or variant of FNE, changes in the config.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    name: (f"objective.name={name}",) for name in registry.OBJECTIVES
} | {
    name: ("objective.name=fne", *(f"{field}={value}" for field, value in changes.items()))
    for name, changes in registry.FNE_VARIANTS.items()
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
      objective: A key of `OBJECTIVES`, alone or with a colon and where its known matches come
        from: `truth`, or one of `match_lists.SOURCES`, which finds them by the warm-up's encoders
        or, with an at sign and another objective, by those of that one's finished run.
      variant: What else is changed, as `--vary` had it; "" for nothing.
    """

    objective: str
    variant: str = ""

    @property
    def name(self) -> str:
        """What the table and the folders call it."""
        return f"{self.objective} {self.variant}" if self.variant else self.objective

    def baseline(self, study_baseline: str, cells: Container[Cell]) -> Cell:
        """Returns what it is compared with: the baseline in the same variant, or without it."""
        varied = Cell(study_baseline, self.variant)
        has_no_list = _varies_lists(self.variant) and varied not in cells
        is_plain = self.objective == study_baseline or has_no_list
        return Cell(study_baseline) if is_plain else varied


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
      matches: The list that is to be made for `config.data.matches`; None for a run without one.
    """

    cell: Cell
    seed: int
    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    warmup: pathlib.Path | None
    warmup_config: ml_collections.ConfigDict
    matches: MatchList | None = None


def study_runs(
    config_path: str,
    overrides: Sequence[str],
    objectives: Sequence[str],
    variants: Sequence[str],
    seeds: int,
    workdir: pathlib.Path,
) -> list[Run]:
    """Returns the runs of a study, those of the first seed first.

    Each objective is run as it is and in each variant, but for variants of a list's classes, which
    only objectives with a list are run in. Runs of one seed whose configs differ only in what
    follows the warm-up share that.

    Objectives are as `Cell.objective`; a variant is `field=value`, or several of these with commas
    between; `overrides` are for all runs, as `--config.x=y`. Raises UserError if an objective is
    unknown or named twice, a config is wrong, or an objective sets a field that is to be changed.
    """
    for name in objectives:
        _check_name(name, objectives)
    cells = _cells(config_path, overrides, objectives, variants)
    _check_nothing_is_dropped(overrides, objectives, variants)
    runs = []
    for seed in range(seeds):
        for cell in cells:
            changes = [*_assignments(cell.variant), f"seed={seed}"]
            common = [*overrides, *(f"--config.{change}" for change in changes)]
            chosen = [f"--config.{change}" for change in _changes(cell.objective)]
            config = configuration.load_config(config_path, [*common, *chosen])
            after = registry.fields_after_warmup(config)
            before = [o for o in common if _field(o) not in after]
            shared, _ = configuration.resolve(configuration.load_config(config_path, before))
            warmup = _warmup_folder(workdir, shared, after)
            matches = _match_list(cell, cells, config.data.matches_negative, seed, workdir, warmup)
            if matches is not None:
                config.data.matches = str(matches.path)
            config, _ = configuration.resolve(config)
            folder = _run_folder(workdir, cell, seed)
            runs.append(Run(cell, seed, config, folder, warmup, shared, matches))
    return runs


def _cells(config_path, overrides, objectives, variants):
    """Returns the cells: a variant of a list's classes is for objectives with a list alone."""
    all_listed = bool(configuration.load_config(config_path, overrides).data.matches)
    cells = [Cell(name) for name in objectives]
    for variant in variants:
        reached = [
            Cell(name, variant)
            for name in objectives
            if all_listed or not _varies_lists(variant) or _parts(name)[1] not in (None, TRUTH)
        ]
        if not reached:
            raise UserError(
                f"--vary={variant}: it sorts the pairs of a list, and none of --objectives has "
                "one; add an objective with one, such as multi_positive:similarity"
            )
        cells += reached
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError("--objectives, --vary: one of them is given twice")
    return cells


def _check_name(name, objectives):
    objective, source, by = _parts(name)
    if objective not in OBJECTIVES:
        raise UserError(
            f"--objectives: there is no {objective!r}; expected some of {', '.join(OBJECTIVES)}"
        )
    if source == TRUTH and by is not None:
        raise UserError(f"--objectives={name}: the truth is not found by a run; leave out @{by}")
    if source not in (None, TRUTH) and not match_lists.is_source(source):
        raise UserError(
            f"--objectives={name}: there is no {source!r}; expected one of "
            f"{', '.join((TRUTH, *match_lists.SOURCES))}"
        )
    if by is not None and (by not in OBJECTIVES or by not in objectives):
        raise UserError(
            f"--objectives={name}: matches are found by the finished run of another of "
            f"--objectives, without a colon, and {by!r} is none; add it, or name one that is"
        )


def _parts(name):
    """Returns an objective, where its matches come from, and whose run finds them; or None."""
    objective, colon, rest = name.partition(_FROM)
    source, at, by = rest.partition(_BY)
    return objective, source if colon else None, by if at else None


def _match_list(cell, cells, least, seed, workdir, warmup):
    """Returns the list that a cell's run takes, down to a probability if that is not 0, or None."""
    _, source, by = _parts(cell.objective)
    if source in (None, TRUTH):
        return None
    if by is not None:
        found_by = cell.baseline(by, cells)
        return MatchList(_run_folder(workdir, found_by, seed), source, least)
    if warmup is None:
        raise UserError(
            f"--objectives: {cell.objective} takes matches that a warm-up finds; make "
            "config.fne.start_epoch more than 0"
        )
    return MatchList(warmup, source, least)


def _changes(objective):
    """Returns what an objective, and the truth if it is to use that, changes in the config."""
    name, source, _ = _parts(objective)
    if source != TRUTH:
        return OBJECTIVES[name]
    entry = registry.OBJECTIVES.get(name)
    use = registry.POSITIVES if entry and entry.takes_positives else registry.DROP
    return *OBJECTIVES[name], f"objective.oracle={use}"


def _check_nothing_is_dropped(overrides, objectives, variants):
    """Raises UserError if a change would not reach a run that is named after it."""
    sets = {name: {_field(change) for change in _changes(name)} for name in objectives}
    for variant in variants:
        for change in _assignments(variant):
            setters = [name for name in objectives if _field(change) in sets[name]]
            if setters:
                raise UserError(
                    f"--vary={variant}: {_field(change)} is what {' and '.join(setters)} of "
                    "--objectives sets itself; vary other fields, or choose among the objectives"
                )
    for override in overrides:
        # An objective may undo what holds for the others: that is what it is named for.
        if all(_field(override) in of for of in sets.values()):
            raise UserError(
                f"{override}: all of --objectives set that field themselves; choose among the "
                "objectives instead"
            )


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


def _varies_lists(variant):
    """Returns whether a variant does nothing but sort the pairs of a list."""
    return {_field(change) for change in _assignments(variant)} <= _OF_LISTS


def _field(override):
    """Returns the field that `--config.x=y` sets."""
    return override.removeprefix("--config.").partition("=")[0]


def _run_folder(workdir, cell, seed):
    return workdir / re.sub(r"[^A-Za-z0-9_.=,+-]", "_", cell.name) / f"seed{seed}"


def _warmup_folder(workdir, config, after):
    if not config.fne.start_epoch:
        return None
    # The same for all that may change from start to start, and for whatever follows.
    fields = {
        name: value
        for name, value in configuration.flatten(config).items()
        if not name.startswith(configuration.MAY_CHANGE) and name not in after
    }
    digest = hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()
    return workdir / "warmups" / digest[:12]

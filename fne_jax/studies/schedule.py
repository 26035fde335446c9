"""The order of a study's work: warm-ups, lists of matches and runs, each after what it needs."""

from __future__ import annotations

import collections
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fne_jax.data.sources.registry import load_split
from fne_jax.errors import UserError
from fne_jax.studies import execution, match_lists
from fne_jax.studies.cells import Run
from fne_jax.training.matches import check_known


class Outcome(NamedTuple):
    """What became of a task: the seconds that it took, and what went wrong, or None."""

    seconds: float
    error: str | None


class Task(NamedTuple):
    """A piece of a study's work.

    Attributes:
      name: What progress calls it.
      work: A function of `execution`.
      run: What it is called with.
      makes: The file or folder that is complete once it has ended.
      needs: Those of other tasks that it waits for.
    """

    name: str
    work: Callable[[Run], None]
    run: Run
    makes: pathlib.Path
    needs: frozenset[pathlib.Path] = frozenset()


def train_missing(runs: Sequence[Run], say: Callable[[str], None]) -> list[str]:
    """Trains and measures every run that has no result yet, and returns a line for each failure.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM; the same call continues.
      UserError: if a run asks for the truth of a dataset that does not know it.
    """
    results = execution.read_results(runs)
    todo = [run for run in runs if run.seed not in results.get(run.cell, ())]
    tasks = plan(todo)
    say(
        f"{len(runs)} runs, {len(runs) - len(todo)} of them done; to do: {len(todo)} runs, "
        f"{len(tasks) - len(todo)} warm-ups and lists of matches that they share"
    )
    _check(todo)
    failures, started = [], time.monotonic()
    for done, (task, (seconds, error)) in enumerate(work_through(tasks), 1):
        shown = f"{seconds:.0f} s" if error is None else f"failed: {error}"
        left = (time.monotonic() - started) / done * (len(tasks) - done) / 60
        say(f"[{done}/{len(tasks)}] {task.name}: {shown}; about {left:.0f} min left")
        if error is not None:
            failures.append(f"{task.name}: {error}")
    return failures


def _check(todo):
    """Raises UserError if a run asks for a truth that is not known, before any is trained."""
    datasets = collections.defaultdict(list)
    for run in todo:
        data = run.config.data.to_dict()
        data = repr({name: data[name] for name in data if not name.startswith("matches")})
        datasets[data, run.config.encoder.image.image_size].append(run)
    for of_dataset in datasets.values():
        config = of_dataset[0].config
        train = load_split(config.data, config.encoder.image.image_size, "train")
        for run in of_dataset:
            check_known(run.config, train)
            if run.matches is not None:
                match_lists.check_source(run.matches, train)


def plan(todo: Sequence[Run]) -> list[Task]:
    """Returns the work that runs without a result ask for: each, and what it needs before it."""
    tasks: dict[pathlib.Path, Task] = {}

    def add(name, work, run, makes, *needs):
        needed = frozenset(path for path in needs if path is not None)
        tasks.setdefault(makes, Task(name, work, run, makes, needed))

    for run in todo:
        name, matches = f"{run.cell.name}, seed {run.seed}", run.matches
        unlisted = matches is not None and not matches.path.exists()
        by_warmup = unlisted and matches.folder == run.warmup
        if run.warmup is not None and not execution.warmup_is_done(run, by_warmup):
            add(f"warm-up of {name}", execution.train_warmup, run, run.warmup)
        if unlisted:
            add(f"matches of {name}", execution.find_matches, run, matches.path, matches.folder)
        given = matches.path if matches is not None else None
        add(name, execution.train_and_measure, run, run.workdir, run.warmup, given)
    return list(tasks.values())


def work_through(tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
    """Does each task once what it needs is there, and yields it; what needs a failed one fails too.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM.
    """
    waiting, unmade = list(tasks), {task.makes for task in tasks}
    failed: dict[pathlib.Path, str] = {}
    while waiting:
        task = next(task for task in waiting if not task.needs & unmade)
        waiting.remove(task)
        started, error = time.monotonic(), None
        if lost := task.needs & failed.keys():
            error = f"needs what failed: {failed[min(lost)]}"
        else:
            try:
                task.work(task.run)
            except UserError as raised:
                error = str(raised)
        unmade.remove(task.makes)
        if error is not None:
            failed[task.makes] = failed[min(lost)] if lost else task.name
        yield task, Outcome(time.monotonic() - started, error)

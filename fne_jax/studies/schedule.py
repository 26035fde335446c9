"""The order of a study's work: warm-ups, lists of matches and runs, each after what it needs."""

from __future__ import annotations

import collections
import logging
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fne_jax.data.sources.registry import load_split
from fne_jax.errors import Interrupted, UserError
from fne_jax.logs import set_up_logging
from fne_jax.studies import execution, match_lists
from fne_jax.studies.cells import Run
from fne_jax.training.interruption import stop_signals
from fne_jax.training.matches import check_known

Outcome = tuple[float, str | None]  # seconds, and what went wrong


class Task(NamedTuple):
    """A piece of a study's work.

    Attributes:
      name: What progress calls it.
      work: A function of a module, for other processes to find.
      run: What it is called with.
      makes: The file or folder that is complete once it has ended.
      needs: Those of other tasks that it waits for.
    """

    name: str
    work: Callable[[Run], None]
    run: Run
    makes: pathlib.Path
    needs: frozenset[pathlib.Path] = frozenset()


def work_through(runs: Sequence[Run], jobs: int, say: Callable[[str], None]) -> list[str]:
    """Trains and measures every run that has no result yet, and returns a line for each failure.

    Args:
      runs: The runs of the study, those of the first seed first.
      jobs: How many to work on at a time, each in a process with its share of the cores; 1 does
        everything in this process.
      say: Shows a line of progress.

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
    datasets = collections.defaultdict(list)
    for run in todo:
        data = run.config.data.to_dict()
        data = repr({name: data[name] for name in data if not name.startswith("matches")})
        datasets[data, run.config.encoder.image.image_size].append(run)
    for of_dataset in datasets.values():
        # Prepared here, once: several processes would do so at the same time.
        config = of_dataset[0].config
        train = load_split(config.data, config.encoder.image.image_size, "train")
        for run in of_dataset:  # before any warm-up is trained
            check_known(run.config, train)
            if run.matches is not None:
                match_lists.check_source(run.matches, train)
    done, failures, started = 0, [], time.monotonic()
    with _Workers(jobs) as workers:
        for done, (task, (seconds, error)) in enumerate(workers.each(tasks), 1):
            shown = f"{seconds:.0f} s" if error is None else f"failed: {error}"
            left = (time.monotonic() - started) / done * (len(tasks) - done) / 60
            say(f"[{done}/{len(tasks)}] {task.name}: {shown}; about {left:.0f} min left")
            if error is not None:
                failures.append(f"{task.name}: {error}")
    if workers.stopped_by is not None:
        raise Interrupted(
            workers.stopped_by,
            f"stopped after {done} of {len(tasks)}, saved; run the same command to continue",
        )
    return failures


def plan(todo: Sequence[Run]) -> list[Task]:
    """Returns the work that runs ask for: each, and before it what it needs and nothing has made.

    Args:
      todo: Runs without a result.
    """
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


class _Workers:
    """Runs work here (one job) or in processes, which a signal (then `stopped_by`) stops."""

    def __init__(self, jobs: int):
        self.stopped_by: int | None = None
        self._jobs, self._previous, self._running = jobs, {}, {}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._free = [cores[number::jobs] or cores for number in range(jobs)]

    def __enter__(self) -> _Workers:
        if self._jobs > 1:
            for number in stop_signals():
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def each(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Yields each task as it ends; after a signal only those that ended well.

        The next one is the first whose needs are met. Whatever needs a failed task fails too.
        """
        waiting, unmade = list(tasks), {task.makes for task in tasks}
        while self._running or (waiting and self.stopped_by is None):
            for task in [task for task in waiting if not task.needs & unmade]:
                if self._free and self.stopped_by is None:
                    waiting.remove(task)
                    self._start(task)
            for task, outcome in self._ended():
                if outcome[1] is None:
                    unmade.discard(task.makes)
                elif self.stopped_by is not None:
                    continue
                yield task, outcome
                if outcome[1] is not None:
                    for lost in _dependents(task, waiting):
                        waiting.remove(lost)
                        yield lost, (0.0, f"needs what failed: {task.name}")

    def _start(self, task):
        cores = self._free.pop()
        if self._jobs == 1:  # done when it is asked what has ended
            self._running[None] = None, task, cores
            return
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        arguments = sender, cores, task.work, task.run
        process = context.Process(target=_work_in_child, args=arguments)
        process.start()
        sender.close()  # so that the child's end is the last one
        if self.stopped_by is not None:  # the signal came just before the process did
            process.terminate()
        self._running[receiver] = process, task, cores

    def _ended(self):
        """Waits for tasks that were started, and returns each with its outcome."""
        if self._jobs == 1:
            _, task, cores = self._running.pop(None)
            self._free.append(cores)
            return [(task, _timed(task.work, task.run))]
        ended = []
        for receiver in multiprocessing.connection.wait(list(self._running)):
            process, task, cores = self._running.pop(receiver)
            self._free.append(cores)
            ended.append((task, _received(receiver, process)))
        return ended

    def _stop(self, number, frame):
        del frame
        self.stopped_by = number
        # Training saves its state on SIGTERM; whatever else a process does, a restart does again.
        for process in multiprocessing.active_children():
            process.terminate()


def _dependents(task, waiting):
    """Returns the waiting tasks that need one, themselves or through others, in any order."""
    lost, unmade = [], {task.makes}
    while more := [other for other in waiting if other not in lost and other.needs & unmade]:
        lost += more
        unmade |= {other.makes for other in more}
    return lost


def _timed(work, run) -> Outcome:
    started, error = time.monotonic(), None
    try:
        work(run)
    except UserError as raised:
        error = str(raised)
    return time.monotonic() - started, error


def _work_in_child(sender, cores, work, run):
    """Works with the given cores, hears no signals but the parent's, and sends the outcome."""
    os.setsid()
    set_up_logging(logging.INFO)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        sender.send(_timed(work, run))
    except Interrupted as stop:
        sys.exit(stop.exit_code)


def _received(receiver, process) -> Outcome:
    """Returns what a process sent before it ended."""
    with receiver:
        try:
            return receiver.recv()
        except EOFError:
            process.join()
            return 0.0, (
                f"its process died with exit code {process.exitcode}, perhaps out of memory; "
                "run the same command to continue, perhaps with fewer --jobs"
            )

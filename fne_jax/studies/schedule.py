"""Works through a study's runs, one after the other or several at a time."""

from __future__ import annotations

import collections
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from fne_jax.data.loading import load_split
from fne_jax.errors import Interrupted, UserError
from fne_jax.logs import set_up_logging
from fne_jax.studies import execution, match_lists
from fne_jax.studies.cells import Run
from fne_jax.training.interruption import stop_signals
from fne_jax.training.matches import check_known

# The seconds that a piece of work took, and what went wrong, or None.
Outcome = tuple[float, str | None]


def work_through(runs: Sequence[Run], jobs: int, say: Callable[[str], None]) -> list[str]:
    """Trains and measures every run that has no result yet, after the warm-ups that runs share.

    Args:
      runs: The runs of the study.
      jobs: How many to work on at a time, each in a process with its share of the cores; 1 does
        everything in this process.
      say: Shows a line of progress.

    Returns:
      What went wrong, a line for each run that could not be trained.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM; the same call goes on from there.
      UserError: if a run asks for the truth of a dataset that does not know it.
    """
    todo = [run for run in runs if execution.read_result(run) is None]
    first = {run.warmup: run for run in reversed(todo) if not execution.warmup_is_done(run)}
    warmups = [run for run in todo if first.get(run.warmup) is run]
    say(
        f"{len(runs)} runs, {len(runs) - len(todo)} of them done; to do: {len(warmups)} warm-ups "
        f"that runs share, {len(todo)} runs"
    )
    for of_dataset in _by_dataset(todo):
        # Prepared here, once: several processes would do so at the same time.
        config = of_dataset[0].config
        train = load_split(config.data, config.encoder.image.image_size, "train")
        for run in of_dataset:  # before any warm-up is trained
            check_known(run.config, train)
            match_lists.check_source(run.matches, train)
    progress, lost = _Progress(len(warmups) + len(todo), say), set()
    with _Workers(jobs) as workers:
        for run, outcome in workers.each(execution.train_warmup, warmups):
            if not progress.note(f"warm-up of {_name(run)}", outcome):
                lost.add(run.warmup)  # each of its runs would fail in the same way
        ready = [run for run in todo if run.warmup is None or run.warmup not in lost]
        progress.done += len(todo) - len(ready)
        for run, outcome in workers.each(execution.train_and_measure, ready):
            progress.note(_name(run), outcome)
    if workers.stopped_by is not None:
        raise Interrupted(
            workers.stopped_by,
            f"stopped after {progress.done} of {progress.total}, saved; the same command goes on "
            "from there",
        )
    return progress.failures


def _by_dataset(runs):
    """Returns the runs in groups that have `config.data` and the side of its images in common."""
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run.config.data.to_json(), run.config.encoder.image.image_size].append(run)
    return list(groups.values())


def _name(run):
    return f"{run.cell.name}, seed {run.seed}"


class _Progress:
    """Counts what is done, collects what failed, and says so.

    Attributes:
      total: Number of warm-ups and runs to do.
      done: How many of them have ended, well or not.
      failures: A line for each that failed.
    """

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.done, self.failures = total, 0, []
        self._say, self._started = say, time.monotonic()

    def note(self, name: str, outcome: Outcome) -> bool:
        """Returns whether the work went well."""
        seconds, error = outcome
        self.done += 1
        if error is not None:
            self.failures.append(f"{name}: {error}")
        shown = f"{seconds:.0f} s" if error is None else f"failed: {error}"
        left = (time.monotonic() - self._started) / self.done * (self.total - self.done) / 60
        self._say(f"[{self.done}/{self.total}] {name}: {shown}; about {left:.0f} min left")
        return error is None


class _Workers:
    """Runs work here (one job) or in processes of their own, which it stops on a signal.

    Attributes:
      stopped_by: The signal that came, or None.
    """

    def __init__(self, jobs: int):
        self.stopped_by: int | None = None
        self._jobs, self._previous = jobs, {}
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

    def each(
        self, work: Callable[[Run], None], runs: Sequence[Run]
    ) -> Iterator[tuple[Run, Outcome]]:
        """Yields each run as its work ends; after a signal, if it ended well in spite of it.

        Args:
          work: A function of a module, for other processes to find.
          runs: What it is called with.
        """
        if self._jobs == 1:
            yield from ((run, _timed(work, run)) for run in runs)
            return
        waiting, running = collections.deque(runs), {}
        while running or (waiting and self.stopped_by is None):
            while waiting and self._free and self.stopped_by is None:
                run, cores = waiting.popleft(), self._free.pop()
                receiver, process = self._start(cores, work, run)
                running[receiver] = process, run, cores
            for receiver in multiprocessing.connection.wait(list(running)):
                process, run, cores = running.pop(receiver)
                outcome = _received(receiver, process)
                self._free.append(cores)
                if self.stopped_by is None or outcome[1] is None:
                    yield run, outcome

    def _start(self, *task):
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work_in_child, args=(sender, *task))
        process.start()
        sender.close()  # so that the child's end is the last one
        if self.stopped_by is not None:  # the signal came just before the process did
            process.terminate()
        return receiver, process

    def _stop(self, number, frame):
        del frame
        self.stopped_by = number
        # Training saves its state on SIGTERM; whatever else a process does, a restart does again.
        for process in multiprocessing.active_children():
            process.terminate()


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
                f"its process died with exit code {process.exitcode}, perhaps for want of memory; "
                "the same command, perhaps with fewer --jobs, goes on from what is saved"
            )

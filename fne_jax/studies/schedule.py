"""Works through a study's runs, one after the other or several at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence

from fne_jax.command_line import set_up_logging
from fne_jax.data.loading import load_split
from fne_jax.errors import Interrupted, UserError
from fne_jax.studies import execution
from fne_jax.studies.cells import Run


def work_through(runs: Sequence[Run], jobs: int, say: Callable[[str], None]) -> list[str]:
    """Trains and measures every run that has no result yet, warm-ups before what shares them.

    Args:
      runs: of the study.
      jobs: processes; each has its share of the cores. 1 does everything in this one.
      say: shows a line of progress.

    Returns:
      What went wrong, a line for each run that could not be trained.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM; the same call goes on from there.
    """
    todo = [run for run in runs if execution.read_result(run) is None]
    waiting = {run.warmup: run for run in reversed(todo) if not execution.warmup_is_done(run)}
    total = len(todo) + len(waiting)
    say(
        f"{len(runs)} runs, {len(runs) - len(todo)} of them done; to do: {len(waiting)} warm-ups "
        f"that runs share, {len(todo)} runs"
    )
    for data, image_size in _datasets(todo):
        # Prepared here, once: several processes would do so at the same time.
        load_split(data, image_size, "train")
    queue = collections.deque()
    for run in todo:
        if waiting.get(run.warmup) is run:
            queue.append((run, execution.train_warmup))
        queue.append((run, execution.train_and_measure))
    done, started, failures = 0, time.monotonic(), []
    with _Processes(jobs) as processes:
        running = {}
        while (queue or running) and processes.stopped_by is None:
            ready = [unit for unit in queue if _is_ready(unit, waiting)]
            for unit in ready[: jobs - len(running)]:
                queue.remove(unit)
                running[processes.submit(*unit)] = unit
            for future in processes.wait(running):
                run, work = running.pop(future)
                name = f"{run.cell.name}, seed {run.seed}"
                if work is execution.train_warmup:
                    name = f"warm-up of {name}"
                seconds, error = _result(future, name)
                done += 1
                if work is execution.train_warmup:
                    del waiting[run.warmup]
                    if error is not None:  # each run would fail in the same way
                        lost = [unit for unit in queue if unit[0].warmup == run.warmup]
                        done += len(lost)
                        queue = collections.deque(unit for unit in queue if unit not in lost)
                if error is not None:
                    failures.append(f"{name}: {error}")
                outcome = f"{seconds:.0f} s" if error is None else f"failed: {error}"
                left = (time.monotonic() - started) / done * (total - done) / 60
                say(f"[{done}/{total}] {name}: {outcome}; about {left:.0f} min left")
    if processes.stopped_by is not None:
        message = f"stopped after {done} of {total}, saved; the same command goes on from there"
        raise Interrupted(processes.stopped_by, message)
    return failures


def _datasets(runs):
    """Returns each `config.data` of the runs once, with the side of its images."""
    found = {}
    for run in runs:
        image_size = run.config.encoder.image.image_size
        found[run.config.data.to_json(), image_size] = (run.config.data, image_size)
    return list(found.values())


def _is_ready(unit, waiting):
    run, work = unit
    return work is execution.train_warmup or run.warmup not in waiting


def _result(future, name):
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            f"{name}: its process died, perhaps for want of memory; the same command, perhaps with "
            "fewer --jobs, goes on from what is saved"
        ) from error


def _timed(run, work):
    """Returns the seconds that it took, and the user's error that ended it or None."""
    started, error = time.monotonic(), None
    try:
        work(run)
    except UserError as raised:
        error = str(raised)
    return time.monotonic() - started, error


class _Processes:
    """Runs work here (one job) or in processes of their own, which it stops on a signal.

    Attributes:
      stopped_by: the signal that came, or None.
    """

    def __init__(self, jobs: int):
        self.stopped_by: int | None = None
        self._pool, self._previous = None, {}
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(
                jobs, context, _begin_worker, (context.Value("i", 0), jobs)
            )

    def __enter__(self) -> _Processes:
        if self._pool is not None:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exception) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def submit(self, run: Run, work: Callable[[Run], None]) -> concurrent.futures.Future:
        """Begins work; without processes it is done when this returns."""
        if self._pool is not None:
            return self._pool.submit(_timed, run, work)
        future = concurrent.futures.Future()
        future.set_result(_timed(run, work))
        return future

    def wait(self, running) -> list[concurrent.futures.Future]:
        """Returns what has finished, at least one; nothing if a signal ended the processes."""
        finished, _ = concurrent.futures.wait(
            running, return_when=concurrent.futures.FIRST_COMPLETED
        )
        if self.stopped_by is None:
            return list(finished)
        # Stopped work raises what stopped it; what has finished in spite of it counts.
        concurrent.futures.wait(running)
        return [future for future in running if future.exception() is None]

    def _stop(self, number, frame):
        del frame
        self.stopped_by = number
        # Training saves its state on SIGTERM; whatever else a process does, a restart does again.
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)


def _begin_worker(counter, jobs):
    """Sets up a process: its own share of the cores, and no signals but its parent's."""
    os.setsid()
    set_up_logging(logging.INFO)
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        share = cores[number % jobs :: jobs]
        os.sched_setaffinity(0, share or cores)

"""Lets each file operation of a tiny run fail once, and looks at what becomes of the run.

python -m tests.support.faults --workdir=DIR [--every=N] [--kill]

An operation is a call of the operating system, as Python makes it, on a path in the run's folder:
in our code, in Orbax's and in the libraries between, in any thread (TensorStore's own, in C++, are
out of reach). A new run and one that resumes list them; then a run for each makes it fail, with
EIO, EACCES, ENOSPC and, where a file is opened to be written, with a disk that is full once the
content comes. The run must go on to its end, or stop with one line that speaks of no damage, and
with the exit code of a failed machine unless permission was denied; the same command must then end
as a run never touched, to the bit, and nothing be set aside. `--kill` ends the process at each
operation instead. DIR/results.tsv has a line for each; given again, the command tries those that
have none there, or a bad one. Exits with 1 if there is a bad one.
"""

import argparse
import builtins
import collections
import concurrent.futures
import contextlib
import errno
import io
import itertools
import logging
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import typing

import jax
import pytest

from fne_jax.errors import EXIT_ENVIRONMENT_FAILURE, UserError
from fne_jax.parallel import sharding
from fne_jax.training import loop
from fne_jax.training.checkpointing import DAMAGED_DIRECTORY
from tests import compiled_once
from tests.support import soak_kill
from tests.support.tiny import LinearTowers, tiny_config
from tests.support.xla_flags import xla_flags

FULL = "full disk"
KILL = "kill"
ERRORS = {"EIO": errno.EIO, "EACCES": errno.EACCES, "ENOSPC": errno.ENOSPC}
KINDS = (*ERRORS, FULL)
_CALLS = {
    os: ("listdir", "lstat", "mkdir", "open", "remove", "rename", "replace", "rmdir", "scandir",
         "stat", "truncate", "unlink", "utime"),
    io: ("open",),
    builtins: ("open",),
}  # fmt: skip
# In the names of fne_jax.files and of TensorStore.
_RANDOM = re.compile(r"[0-9a-f]{8}(?=\.incomplete)|[0-9a-f]{32}")


class Operation(typing.NamedTuple):
    """A call on a file, found again in another run whatever other threads do meanwhile."""

    call: str
    path: str  # in the folder
    writes: bool  # opens a file to write its content
    before: int  # equal calls before it


class Operations:
    """The file operations on a folder while it is a context, and the one that fails.

    Args:
      folder: The folder.
      failing: The operation that fails; None for none.
      kind: How it fails: one of `KINDS`, or `KILL`.

    Attributes:
      done: The operations so far.
    """

    def __init__(self, folder, failing=None, kind=None):
        self._folder, self._failing, self._kind = str(folder), failing, kind
        self._lock, self._patch = threading.Lock(), pytest.MonkeyPatch()
        self._counts = collections.Counter()
        self.done = []

    def __enter__(self):
        for module, names in _CALLS.items():
            for name in names:
                self._patch.setattr(module, name, self._watched(name, getattr(module, name)))
        return self

    def __exit__(self, *exception):
        self._patch.undo()

    def _watched(self, name, call):
        def watched(*arguments, **keywords):
            paths = _paths(arguments, keywords)
            if not any(path.startswith(self._folder) for path in paths):
                return call(*arguments, **keywords)
            mode = arguments[1] if len(arguments) > 1 else keywords.get("mode", "r")
            writes = name == "open" and isinstance(mode, str) and not mode.startswith("r")
            path = _RANDOM.sub("*", paths[0].removeprefix(self._folder))
            with self._lock:
                operation = Operation(name, path, writes, self._counts[name, path, writes])
                self._counts[name, path, writes] += 1
                self.done.append(operation)
            if operation != self._failing:
                return call(*arguments, **keywords)
            if self._kind == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            if self._kind != FULL:
                number = ERRORS[self._kind]
                raise OSError(number, os.strerror(number), paths[0])
            return call("/dev/full", *arguments[1:], **keywords)

        return watched


def _paths(arguments, keywords):
    """Returns the paths that a call names, also by the descriptors of files and folders."""
    folder = keywords.get("dir_fd")
    paths = []
    for argument in arguments[:2]:
        if isinstance(argument, int) and not paths:
            paths.append(os.readlink(f"/proc/self/fd/{argument}"))
        elif isinstance(argument, str | os.PathLike):
            within = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")
            paths.append(os.path.join(within, str(argument)))
    return paths


@contextlib.contextmanager
def one_device():
    """Lets runs use the first device alone: on more of them, sums have another order."""
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "create_mesh", lambda *sizes: mesh)
        yield


def train(workdir):
    """Trains three steps, each of them saved, without TensorBoard, which is slow to import."""
    config = tiny_config(num_epochs=0.45, checkpoint__every_steps=1, logging__every_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "clu", None)
        loop.train_and_evaluate(config, workdir, module=LinearTowers())


def operations_of(workdir):
    """Returns the file operations of a run that nothing disturbs."""
    with Operations(workdir) as operations:
        train(workdir)
    return operations.done


def begun(workdir, untouched):
    """Makes a run that lacks its last step, and returns its folder."""
    shutil.copytree(untouched, workdir)
    shutil.rmtree(workdir / "checkpoints" / "3")
    return workdir


class Starts:
    """The untouched run, made in a folder, and the ways in which one begins.

    Attributes:
      untouched: The folder of the run that nothing disturbed.
      operations: Those of a `new` run and of one that is `resumed`.
    """

    def __init__(self, folder):
        self._folder, self.untouched = folder, folder / "untouched"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.untouched, ignore_errors=True)
        self.operations = {"new": operations_of(self.untouched)}
        with self.folder_of("resumed") as workdir:
            self.operations["resumed"] = operations_of(workdir)

    @contextlib.contextmanager
    def folder_of(self, start):
        """Yields the folder of a run to be begun so; after an error it stays until the next."""
        workdir = self._folder / "run"
        shutil.rmtree(workdir, ignore_errors=True)
        if start == "resumed":
            begun(workdir, self.untouched)
        yield workdir
        shutil.rmtree(workdir)

    def faults(self, every=1, kinds=KINDS):
        """Yields start, operation and kind of the faults to be tried: every so many of all."""
        possible = (
            (start, operation, kind)
            for start, operations in self.operations.items()
            for operation in operations
            for kind in kinds
            if kind != FULL or operation.writes
        )
        return itertools.islice(possible, 0, None, every)

    def outcome(self, start, operation, kind):
        """Returns what became of a run with a fault: `went on`, `killed`, `not met` or a message.

        Raises:
          AssertionError: If the run, or the one after it, did not what it should.
        """
        with self.folder_of(start) as workdir:
            if kind == KILL:
                outcome = "killed" if killed(workdir, operation) else "not met"
            else:
                outcome = with_fault(workdir, operation, kind)
            train(workdir)
            lost = soak_kill.differences(workdir, self.untouched)
            lost += [p.name for p in workdir.rglob("*") if "tmp" in p.name or "incompl" in p.name]
            assert not lost, f"{lost} after {outcome!r}"
            assert not (workdir / DAMAGED_DIRECTORY).exists(), f"set aside after {outcome!r}"
        return outcome


def with_fault(workdir, operation, kind):
    """Returns what a run with a fault said as it stopped, `went on`, or `not met`.

    Raises:
      AssertionError: If it said it in several lines, called it damage, or has a wrong exit code.
      Exception: Whatever else than a UserError the run raised.
    """
    before, said = set(threading.enumerate()), "went on"
    with Operations(workdir, operation, kind) as operations:
        try:
            train(workdir)
        except UserError as error:
            said = str(error)
            assert "\n" not in said and "damage" not in said, said
            # After a failed stat the libraries tell of a path that is there, or is not.
            mistaken = kind == "EACCES" or operation.call in ("stat", "lstat")
            assert mistaken or error.exit_code == EXIT_ENVIRONMENT_FAILURE, said
        # The process would wait for them as it ends; those of pools are told to end then.
        for thread in set(threading.enumerate()) - before:
            if not thread.daemon and thread not in concurrent.futures.thread._threads_queues:
                thread._started.wait(10)  # it may be listed before
                threading.Thread.join(thread, 10)  # Orbax's own raises what the thread did
                assert not thread.is_alive(), f"{thread.name} goes on for ever"
    return said if operation in operations.done else "not met"


def killed(workdir, operation):
    """Trains in a process of its own that is killed at an operation; returns whether it was.

    It comes of a server that has imported everything and uses neither JAX's devices nor threads,
    and has the flags of this process: with others, programs round in another way.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__spec__.name])
    process = context.Process(target=_train_killed, args=(workdir, operation))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}"
    return process.exitcode != 0


def _train_killed(workdir, operation):
    # Safe for programs of one CPU device (compile_cache.py).
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(workdir.with_name("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    logging.disable()
    with one_device(), Operations(workdir, operation, KILL):
        train(workdir)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    # The server of `killed` imports this module a second time, which Python warns of.
    warnings = {"PYTHONWARNINGS": "ignore::RuntimeWarning"}
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)} | warnings
    compiled_once.install()
    logging.disable()
    starts = Starts(options.workdir)
    results = options.workdir / "results.tsv"
    results.touch()
    tried = [line.split("\t") for line in results.read_text().splitlines()]
    tried = [line for line in tried if line[-2] == "good"]
    results.write_text("".join("\t".join(line) + "\n" for line in tried))
    for fault in starts.faults(options.every, (KILL,) if options.kill else KINDS):
        start, operation, kind = fault
        names = [start, kind, *map(str, operation)]
        if names in [line[:-2] for line in tried]:
            continue
        try:
            result = ["good", starts.outcome(*fault)]
        except Exception as error:
            result = ["BAD", repr(error)]
        tried.append(names + result)
        with results.open("a") as stream:
            print(*tried[-1], sep="\t", file=stream)
    print(*(f"{len(o)} operations of a {s} run" for s, o in starts.operations.items()), sep=", ")
    for count in counts(tried):
        print(*count, sep="\t")
    sys.exit(any(line[-2] == "BAD" for line in tried))


def counts(tried):
    """Yields a line for each kind of fault: how often it ended how."""
    outcomes = collections.Counter()
    for _, kind, *_, judged, outcome in tried:
        known = outcome in ("went on", "killed", "not met")
        outcomes[kind, judged, outcome if known else "stopped"] += 1
    yield from ((*key, count) for key, count in sorted(outcomes.items()))


if __name__ == "__main__":
    main()

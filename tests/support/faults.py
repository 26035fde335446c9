"""Lets each file operation of a tiny run fail once, and looks at what becomes of the run.

python -m tests.support.faults --workdir=DIR [--every=N] [--kill]

An operation is a call of the operating system, as Python makes it, on a path in the run's folder:
in our code, in Orbax's and in the libraries between, in any thread (TensorStore's own, in C++, are
out of reach). A new run and one that resumes count them; then a run for each makes it fail, with
EIO, EACCES, ENOSPC and, where a file is opened to be written, with a disk that is full once the
content comes. The run must go on to its end, or stop with one line; the same command must then end
as a run never touched, to the bit. `--kill` ends the process at each operation instead. Exits with
1 if a state was lost.
"""

import argparse
import builtins
import concurrent.futures
import errno
import io
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from fne_jax.errors import UserError
from fne_jax.training import loop
from tests import compiled_once
from tests.support import TOP, soak_kill
from tests.support.tiny import LinearTowers, tiny_config

FULL = "full disk"
KILL = "kill"
KINDS = (errno.EIO, errno.EACCES, errno.ENOSPC, FULL)
_CALLS = {
    os: ("listdir", "mkdir", "open", "remove", "rename", "replace", "rmdir", "scandir", "stat",
         "unlink", "utime"),
    io: ("open",),
    builtins: ("open",),
}  # fmt: skip


class Operations:
    """The file operations on a folder while it is a context, and the one that fails.

    Args:
      folder: The folder.
      failing: The number of the operation that fails, from 0; None for none.
      kind: How it fails: an errno, `FULL` or `KILL`.

    Attributes:
      calls: The operations so far, as (name of the call, path in the folder, whether it writes).
    """

    def __init__(self, folder, failing=None, kind=errno.EIO):
        self._folder, self._failing, self._kind = str(folder), failing, kind
        self._lock, self._patch = threading.Lock(), pytest.MonkeyPatch()
        self.calls = []

    def __enter__(self):
        for module, names in _CALLS.items():
            for name in names:
                self._patch.setattr(module, name, self._watched(name, getattr(module, name)))
        return self

    def __exit__(self, *exception):
        self._patch.undo()

    def _watched(self, name, call):
        def watched(*arguments, **keywords):
            paths = [str(a) for a in arguments[:2] if isinstance(a, str | os.PathLike)]
            if not any(path.startswith(self._folder) for path in paths):
                return call(*arguments, **keywords)
            writes = name == "open" and len(paths) > 1 and not paths[1].startswith("r")
            with self._lock:
                number = len(self.calls)
                self.calls.append((name, paths[0].removeprefix(self._folder), writes))
            if number != self._failing:
                return call(*arguments, **keywords)
            if self._kind == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            if self._kind != FULL:
                raise OSError(self._kind, os.strerror(self._kind), paths[0])
            return call("/dev/full", *arguments[1:], **keywords) if writes else call(*arguments)

        return watched


def config():
    return tiny_config(num_epochs=0.45, checkpoint__every_steps=1, logging__every_steps=1)


def train(workdir):
    """Trains three steps, each of them saved, without TensorBoard, which is slow to import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "clu", None)
        loop.train_and_evaluate(config(), workdir, module=LinearTowers())


def counted(workdir):
    """Returns the file operations of a run that nothing disturbs."""
    with Operations(workdir) as operations:
        train(workdir)
    return operations.calls


def begun(workdir, untouched):
    """Makes a run that lacks its last step, and returns its folder."""
    shutil.copytree(untouched, workdir)
    shutil.rmtree(workdir / "checkpoints" / "3")
    return workdir


def with_fault(workdir, number, kind):
    """Trains with a fault, and again without one.

    Returns:
      What the first run said as it stopped, or None if it went on to its end.

    Raises:
      Exception: Whatever else than a UserError the first run, or anything the second, raised.
    """
    before, said = set(threading.enumerate()), None
    with Operations(workdir, number, kind):
        try:
            train(workdir)
        except UserError as error:
            said = str(error)
        # The process would wait for them as it ends; those of pools are told to end then.
        for thread in set(threading.enumerate()) - before:
            if not thread.daemon and thread not in concurrent.futures.thread._threads_queues:
                thread._started.wait(10)  # it may be listed before
                threading.Thread.join(thread, 10)  # Orbax's own raises what the thread did
                assert not thread.is_alive(), f"{thread.name} goes on for ever"
    train(workdir)
    return said


def killed(workdir, number):
    """Trains in a process of its own that is killed at an operation; returns whether it was."""
    code = (
        "import sys; from tests.support import faults\n"
        "with faults.Operations(sys.argv[1], int(sys.argv[2]), faults.KILL):\n"
        "    faults.train(__import__('pathlib').Path(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(workdir), str(number)],
        cwd=TOP, env=os.environ | soak_kill.cached(workdir.parent / "xla"), capture_output=True,
    )  # fmt: skip
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode != 0


def faults_of(calls, every=1, kinds=KINDS):
    """Yields the number and the kind of the faults to be tried: every so many of all."""
    possible = (
        (number, kind)
        for number, (_, _, writes) in enumerate(calls)
        for kind in kinds
        if kind != FULL or writes
    )
    return itertools.islice(possible, 0, None, every)


def lost(workdir, untouched):
    """Returns what differs from the untouched run, and what should not be there."""
    scratch = [p.name for p in workdir.rglob("*") if "tmp" in p.name or "incomplete" in p.name]
    return soak_kill.differences(workdir, untouched) + scratch


def tried(workdir, number, kind):
    """Returns what `with_fault`, or `killed` and another run, make of a run's folder."""
    if kind != KILL:
        return with_fault(workdir, number, kind)
    said = "killed" if killed(workdir, number) else None
    train(workdir)
    return said


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    compiled_once.install()
    kinds = (KILL,) if options.kill else KINDS
    untouched = options.workdir / "untouched"
    calls = {"new": counted(untouched)}
    calls["resumed"] = counted(begun(options.workdir / "counted", untouched))
    count = stopped = bad = 0
    for start, of_start in calls.items():
        for number, kind in faults_of(of_start, options.every, kinds):
            workdir = options.workdir / f"{start}-{number}-{kind}".replace(" ", "-")
            if start == "resumed":
                begun(workdir, untouched)
            try:
                said = tried(workdir, number, kind)
                different = lost(workdir, untouched)
            except Exception as error:
                said, different = None, [f"{type(error).__name__}: {error}"]
            count, stopped, bad = count + 1, stopped + (said is not None), bad + bool(different)
            name, path, _ = of_start[number]
            print(start, number, name, path, kind, said, different or "", sep="\t", flush=True)
            if not different:
                shutil.rmtree(workdir)
    print(
        f"{sum(map(len, calls.values()))} operations, {count} faults: {count - stopped} runs went "
        f"on, {stopped} stopped; states lost or other errors: {bad}"
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

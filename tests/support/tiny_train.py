"""`python -m tests.support.tiny_train --workdir=DIR` trains with towers that compile fast.

With `--unread=INDEX:PATH` process INDEX meets EIO as it opens a file of the workdir.

Beside what a run leaves, it appends each step's negatives to negatives.<process>.jsonl in the
workdir, for tests that compare runs step by step.
"""

import contextlib
import json
import pathlib
import sys

import jax
import pytest

from fne_jax import command_line, train
from fne_jax.training.step_results import StepResults
from tests.support import faults
from tests.support.tiny import LinearTowers, smooth_config


def get_config():
    return smooth_config(checkpoint__every_steps=1, logging__every_steps=1)


def record_negatives(patch, workdir):
    """Lets runs of this process append the negatives of each of their steps to a file."""
    add = StepResults.add

    def recorded(self, step, scalars, negatives):
        chosen = {name: ids.tolist() for name, ids in jax.device_get(negatives).items()}
        path = pathlib.Path(workdir) / f"negatives.{jax.process_index()}.jsonl"
        with path.open("a") as stream:
            stream.write(json.dumps({"step": step} | chosen) + "\n")
        add(self, step, scalars, negatives)

    patch.setattr(StepResults, "add", recorded)


def recorded_negatives(workdir):
    """Returns what all processes chose, by step; fails if two of them differ."""
    by_step = {}
    for path in sorted(workdir.glob("negatives.*.jsonl")):
        for line in path.read_text().splitlines():
            chosen = json.loads(line)
            step = chosen.pop("step")
            assert by_step.setdefault(step, chosen) == chosen, f"{path.name}, step {step}"
    return by_step


def fault_of(workdir, unread, arguments):
    """Returns the context of the run: a read error, if the flag is for this process."""
    for index, path in (flag.split(":") for flag in unread):
        if f"--process-index={index}" in arguments:
            return faults.Operations(workdir, faults.Operation("open", path, False, 0), "EIO")
    return contextlib.nullcontext()


def main(arguments):
    (workdir,) = (a.removeprefix("--workdir=") for a in arguments if a.startswith("--workdir="))
    unread = [a.removeprefix("--unread=") for a in arguments if a.startswith("--unread=")]
    arguments = [a for a in arguments if not a.startswith("--unread=")]
    with pytest.MonkeyPatch.context() as patch, fault_of(workdir, unread, arguments):
        # Importing it takes longer than the run, and nobody reads these runs' TensorBoard logs.
        patch.setitem(sys.modules, "clu", None)
        record_negatives(patch, workdir)
        train.main([f"--config={__file__}", *arguments], LinearTowers())


if __name__ == "__main__":
    command_line.run(main)

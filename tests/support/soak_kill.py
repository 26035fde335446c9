"""Kills a tiny run at random times and compares its end with that of a run never touched.

python -m tests.support.soak_kill --kills=20 --workdir=DIR [--seed=0]

Each kill is a SIGKILL, then the same command again: one in four at a moment of the start, before
the first step, the others while training, where a checkpoint is written after each step, so that
many moments lie within a save. A run that comes to its end is compared, and the next begun until
there were enough kills. Exits with 1 if parameters, optimizer, queue, statistics or metrics (but
for times) differ in a bit.
"""

import argparse
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time

import jax
import numpy as np

from fne_jax.training.metric_log import read_metrics
from tests.support import TOP
from tests.support.runs import stored_state
from tests.support.tiny import LinearTowers
from tests.support.xla_flags import xla_flags

TIMED = ("pairs_per_s", "data_wait_share")
# In the log just before the workdir is touched, and before the first step.
STARTING, TRAINING = re.compile("training pairs"), re.compile(r"step \d+: (warm-up|false)")
STEPS = "--config.num_epochs=10"  # 70 of them


def cached(folder):
    """Returns the variables that make commands keep their compiled programs in a folder.

    For one CPU device that is safe (compile_cache.py), and kills meet the cache's writes as well.
    """
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(workdir, *arguments, devices=1, variables=None):
    """Returns the started command, its stderr a pipe."""
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.tiny_train", f"--workdir={workdir}", *arguments],
        cwd=TOP,
        env=os.environ | settings | (variables or {}),
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Waits for the command; returns its log and the seconds of its start and its training."""
    lines, times = [], {}
    for line in process.stderr:
        lines.append(line)
        for mark in (STARTING, TRAINING):
            if mark.search(line):
                times.setdefault(mark, time.monotonic())
    process.wait()
    process.stderr.close()
    log = "".join(lines)
    assert process.returncode == 0, log
    end = time.monotonic()
    begun = times.get(TRAINING, end)
    return log, {STARTING: begun - times[STARTING], TRAINING: end - begun}


def kill_at(process, mark, wait):
    """Kills the command `wait` seconds after a line of its log; returns whether it still ran."""
    for line in process.stderr:
        if mark.search(line):
            break
    # Nobody reads on, and a full pipe would stop the command.
    reader = threading.Thread(target=process.stderr.read, daemon=True)
    reader.start()
    try:
        process.wait(wait)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    finally:
        reader.join()
        process.stderr.close()


def differences(workdir, other):
    """Returns the names of what differs between the ends of two runs."""
    ours, theirs = (
        jax.tree_util.tree_leaves_with_path(
            jax.device_get(state.replace(key=jax.random.key_data(state.key)))
        )
        for state in (stored_state(folder, module=LinearTowers()) for folder in (workdir, other))
    )
    different = [
        jax.tree_util.keystr(path)
        for (path, a), (_, b) in zip(ours, theirs, strict=True)
        if np.asarray(a).tobytes() != np.asarray(b).tobytes()
    ]
    lines = [
        [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(folder)]
        for folder in (workdir, other)
    ]
    return different + ["metrics.jsonl"] * (lines[0] != lines[1])


def soak(folder, kills, seed, *arguments):
    """Returns what differs after so many kills, the runs compared, and the kills within a save."""

    def started(name):
        return start(folder / name, STEPS, *arguments, variables=cached(folder / "xla"))

    _, seconds = finish(started("untouched"))
    rng, done, runs, within_saves, different = random.Random(seed), 0, 0, 0, []
    while done < kills:
        name = f"killed{runs}"
        while done < kills:
            mark = rng.choice([STARTING, TRAINING, TRAINING, TRAINING])
            # A third of the way at most, so that a run takes several kills.
            wait = rng.uniform(0, seconds[mark] / 3)
            if not kill_at(started(name), mark, wait):
                break  # the run has come to its end
            done += 1
            within = any((folder / name / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
            within_saves += within
            during = "training" if mark is TRAINING else "the start"
            where = ", within a save" if within else ""
            print(f"run {runs}, kill {done}, {wait:.2f} s into {during}{where}")
        finish(started(name))
        pair = folder / name, folder / "untouched"
        different += [f"{name}: {what}" for what in differences(*pair)]
        runs += 1
    return different, runs, within_saves


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    options, arguments = parser.parse_known_args()
    different, runs, within_saves = soak(options.workdir, options.kills, options.seed, *arguments)
    print(
        f"{options.kills} kills in {runs} runs, {within_saves} of them within a save; "
        f"different from the untouched run: {', '.join(different) or 'nothing'}"
    )
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

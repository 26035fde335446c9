"""Measuring compiled functions on machines whose speed drifts, and the memory of a process."""

from __future__ import annotations

import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def median_seconds(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Returns the median wall time of each function, run in turns.

    Turns, rather than one after the other, so that a slow minute of the machine falls on all.

    Each is called without arguments, and what it returns is waited for; a call that compiles and
    one that warms up do not count.
    """
    for _ in range(2):
        for function in functions.values():
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def window_seconds(
    run: Callable[[], Any], wait: Callable[[], Any], steps: int, windows: int
) -> list[float]:
    """Returns the wall time a call in each window of calls that are not waited for one by one.

    Three calls before the first window are not timed; `wait` returns once all calls are done.
    """
    for _ in range(3):
        run()
    wait()
    seconds = []
    for _ in range(windows):
        start = time.perf_counter()
        for _ in range(steps):
            run()
        wait()
        seconds.append((time.perf_counter() - start) / steps)
    return seconds


def machine() -> dict[str, Any]:
    """Returns what a figure needs beside it: the kind and number of devices, and jax's version."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
    }


def peak_memory_bytes() -> int:
    """Returns the most memory that this process has held."""
    # On Linux getrusage goes on from the peak of the process that started this one.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].removesuffix("kB")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

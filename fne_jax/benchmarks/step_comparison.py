"""The train step beside PyTorch's and beside its plan: what the parts measured, as one dict."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from fne_jax.benchmarks.step import training_on_one_device
from fne_jax.planning.topology import CHIPS
from fne_jax.planning.useful import useful_flops

JAX = "jax"
# In the order of a round; each runs in a process of its own, which has the device to itself.
PARTS = (JAX, "pytorch_float32", "pytorch_bfloat16")
# Cards whose peaks are below those of the chip's name in NVIDIA's tables.
_SLOWER_CARDS = ("pcie", "nvl")
_log = logging.getLogger(__name__)


def compare(
    config: ml_collections.ConfigDict,
    rounds: int,
    *,
    run_part: Callable[[str, str | None], dict[str, Any]],
    run_plan: Callable[[str], dict[str, Any]],
    peak_flops: float | None = None,
    topology: str | None = None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Runs all parts in turns, then the plan.

    A part that fails is an entry `error`, and is not tried again.

    Args:
      config: As loaded.
      rounds: Times that each part runs.
      run_part: Takes one of `PARTS` and the platform that it must run on, None while that is not
        known, and returns what it measured, or `error`.
      run_plan: Takes a topology, and returns the plan of the config for it, or `error`.
      peak_flops: The device's peak; None for that of its chip.
      topology: The topology of the plan; None for one of the device's chip.
      save: Takes the result after every part, so that a run cut short leaves what it has.

    Returns:
      For each part the median seconds of a step, pairs a second, `mfu` (the useful FLOPs by the
      device's peak) and what it said of itself; how many times PyTorch's pairs a second ours are;
      the plan, and what was measured over what it says. What cannot be known is None.

    Raises UserError if the config does not suit a made-up batch.
    """
    result = _about(config)
    parts = result["parts"]
    for turn in range(rounds):
        for name in PARTS:
            if "error" in parts.get(name, {}):
                continue
            _log.info("round %d of %d: %s", turn + 1, rounds, name)
            found = run_part(name, parts.get(JAX, {}).get("platform"))
            parts[name] = _joined(parts.get(name), found)
            device = next((part["device"] for part in parts.values() if "device" in part), "")
            result["chip"] = chip = chip_of(device)
            result["peak_flops"] = peak_flops or (CHIPS[chip].flops if chip else None)
            _rate(result)
            save(result)
    topology = topology or (f"{result['chip']}:1" if result["chip"] else None)
    if topology is None:
        result["plan"] = {"error": f"no chip is known of this device; name one: {sorted(CHIPS)}"}
    else:
        _log.info("plan for %s", topology)
        result["plan"] = run_plan(topology)
        result["beside_plan"] = _beside_plan(parts[JAX], result["plan"])
    save(result)
    return result


def chip_of(device: str) -> str | None:
    """Returns the key of `CHIPS` that is part of a device's name; None for cards of lower peaks."""
    name = device.lower()
    if any(card in name for card in _SLOWER_CARDS):
        return None
    return next((chip for chip in CHIPS if chip in name), None)


def json_of(
    command: Sequence[str], environment: Mapping[str, str], seconds: float = 900
) -> dict[str, Any]:
    """Returns the JSON object that a command prints last, or `error` with its last words."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:g} s"}
    except OSError as error:
        return {"error": str(error)}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    words = [line for line in done.stderr.splitlines() if line.strip()][-3:]
    return {"error": "\n".join(words)[-1000:], "exit_code": done.returncode}


def _about(config):
    model = training_on_one_device(config).model
    batch, useful = model.config.global_batch_size, useful_flops(model)
    return {
        "benchmark": "step",
        "batch": batch,
        "micro_batches": model.config.micro_batches,
        "queue": model.config.queue_size,
        "useful_flops_per_pair": useful,
        "useful_flops_per_step": batch * useful,
        "parts": {},
        "plan": None,
        "beside_plan": None,
    }


def _joined(before, found):
    """Returns a part's figures with those of a further round."""
    if before is None or "error" in found:
        return {**(before or {}), **found}
    return {**before, "window_step_s": before["window_step_s"] + found["window_step_s"]}


def _rate(result):
    """Adds what follows from the times so far."""
    parts, peak = result["parts"], result["peak_flops"]
    for part in parts.values():
        if "window_step_s" in part:
            seconds = part["step_s"] = statistics.median(part["window_step_s"])
            part["pairs_per_s"] = result["batch"] / seconds
            part["useful_flops_per_s"] = result["useful_flops_per_step"] / seconds
            part["mfu"] = part["useful_flops_per_s"] / peak if peak else None
    ours = parts.get(JAX, {}).get("pairs_per_s")
    result["pairs_per_s_over"] = {
        name: ours / part["pairs_per_s"]
        for name, part in parts.items()
        if name != JAX and ours and "pairs_per_s" in part
    }


def _beside_plan(ours, plan):
    """Returns what was measured over what the plan says."""
    pairs = {
        "step": (ours.get("step_s"), plan.get("roofline_step_seconds")),
        "memory": (ours.get("peak_bytes"), plan.get("hbm_bytes_per_chip")),
        "compiled_memory": (ours.get("compiled_bytes"), plan.get("hbm_bytes_per_chip")),
        "mfu": (ours.get("mfu"), plan.get("roofline_mfu")),
    }
    return {
        f"{name}_measured_over_planned": measured / planned if measured and planned else None
        for name, (measured, planned) in pairs.items()
    }

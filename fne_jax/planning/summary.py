"""What a compiled train step takes of a machine, as one dict and as text."""

from __future__ import annotations

import collections
import math
from typing import Any

import jax

from fne_jax.planning.accounting import Account
from fne_jax.planning.operations import TPU_FLOAT32
from fne_jax.planning.program import Program
from fne_jax.planning.topology import Topology
from fne_jax.training import train_step

ENCODERS = (
    train_step.FROZEN_ENCODERS,
    train_step.ONLINE_ENCODERS,
    train_step.MOMENTUM_ENCODERS,
)
SCOPES = (
    *ENCODERS,
    train_step.OPTIMIZER,
    train_step.MOMENTUM_UPDATE,
    train_step.OBJECTIVE,
    train_step.QUEUE,
)
# All else is the strategy's: the objective, the queue, the momentum update and what is unnamed.
_NOT_STRATEGY = (*ENCODERS, train_step.OPTIMIZER)


def summarize(
    program: Program, topology: Topology, pairs: int | None, steps_per_epoch: int | None
) -> dict[str, Any]:
    """Returns the plan as JSON-able values; what cannot be counted is left out.

    Args:
      program: The compiled step.
      topology: The machine that it is compiled for.
      pairs: The number of training pairs; None if unknown.
      steps_per_epoch: The number of steps in an epoch; None if unknown.
    """
    training, chip = program.training, topology.chip
    config, state = training.model.config, training.state
    kinds = {
        "parameters": state.params,
        "frozen": state.frozen_params,
        "momentum": state.momentum_params,
        "adam": state.opt_state,
        "queue": state.queue,
        "batch": training.abstract_batch(),
    }
    sizes = {kind: _bytes_per_device(tree) for kind, tree in kinds.items()}
    limit = program.limit or (chip.main_memory if chip else None)
    plan = {
        "topology": topology.name,
        "devices": len(topology.devices),
        "mesh": dict(training.model.mesh.shape),
        "global_batch_size": config.global_batch_size,
        "micro_batches": config.micro_batches,
        "queue_size": config.queue_size,
        "fits": program.text is not None and (limit is None or program.memory <= limit),
        "hbm_bytes_per_chip": program.memory,
        "hbm_limit_bytes_per_chip": limit and int(limit),
        "bytes_per_chip": {**sizes, "activations": program.scratch},
        "training_pairs": pairs,
        "steps_per_epoch": steps_per_epoch,
        "epochs": config.num_epochs,
        "useful_flops_per_chip": program.useful_flops
        * (config.global_batch_size // len(topology.devices)),
    }
    if program.text is None:
        return plan
    plan |= _work(program, topology)
    return plan if chip is None else plan | _roofline(plan, chip)


def _work(program, topology):
    """Returns what a step computes, moves and sends."""
    chip = topology.chip
    found = Account(program.text, SCOPES, float32=chip.float32 if chip else TPU_FLOAT32)
    in_tiles = Account(program.text, SCOPES, in_tiles=True).work.values()
    total = {
        field: sum(getattr(work, field) for work in found.work.values())
        for field in ("flops", "matrix_passes", "bytes")
    }
    strategy = [work for scope, work in found.work.items() if scope not in _NOT_STRATEGY]
    # Of what a ring gives it, a device sends as much; of an all-reduce twice as much.
    sent = sum(c.bytes * c.count * (1 + (c.kind == "all-reduce")) for c in found.collectives)
    return {
        "flops_per_chip": total["flops"],
        "matrix_passes_per_chip": total["matrix_passes"],
        "flops": total["flops"] * len(topology.devices),
        "hbm_traffic_bytes_per_chip": total["bytes"],
        "hbm_traffic_bytes_in_tiles_per_chip": sum(work.bytes for work in in_tiles),
        "work_per_chip": {
            scope: {"flops": work.flops, "bytes": work.bytes} for scope, work in found.work.items()
        },
        "strategy_flops_per_chip": sum(work.flops for work in strategy),
        "strategy_bytes_per_chip": sum(work.bytes for work in strategy),
        "strategy_flop_share": sum(work.flops for work in strategy) / total["flops"],
        "strategy_byte_share": sum(work.bytes for work in strategy) / total["bytes"],
        "collectives": _grouped(found.collectives),
        "collective_bytes_per_chip": sent,
        "kernels": _kernels(found.kernels),
    }


def _roofline(plan, chip):
    """Returns the bounds of a step's time, each as if the others cost nothing."""
    bounds = {
        "matrix products": plan["matrix_passes_per_chip"] / chip.flops,
        "memory": plan["hbm_traffic_bytes_per_chip"] / chip.memory_bandwidth,
        "links": plan["collective_bytes_per_chip"] / chip.link_bandwidth,
    }
    bound_by = max(bounds, key=bounds.get)
    seconds, steps = bounds[bound_by], plan["steps_per_epoch"]
    return {
        "roofline_seconds": bounds,
        "roofline_step_seconds": seconds,
        "roofline_bound_by": bound_by,
        # Of the peak of bfloat16, whatever the dtype of the program.
        "roofline_mfu": plan["useful_flops_per_chip"] / (chip.flops * seconds),
        "roofline_pairs_per_second": plan["global_batch_size"] / seconds,
        "roofline_hours": steps and plan["epochs"] * steps * seconds / 3600,
    }


def _bytes_per_device(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _grouped(collectives):
    """Returns the collectives by kind and scope, those of the most bytes first."""
    sizes, counts = collections.Counter(), collections.Counter()
    for one in collectives:
        sizes[one.kind, one.scope] += one.bytes * one.count
        counts[one.kind, one.scope] += one.count
    return [
        {"kind": kind, "scope": scope, "count": counts[kind, scope], "bytes": size}
        for (kind, scope), size in sizes.most_common()
    ]


def _kernels(kernels):
    """Returns the kernels by name and scope, in the order of the program."""
    counts, flops = collections.Counter(), collections.defaultdict(int)
    for one in kernels:
        counts[one.name, one.scope, one.flops is None] += one.count
        flops[one.name, one.scope, one.flops is None] += (one.flops or 0) * one.count
    return [
        {
            "kernel": name,
            "scope": scope,
            "count": count,
            "flops": None if unknown else flops[name, scope, unknown],
        }
        for (name, scope, unknown), count in counts.items()
    ]


def render(plan: dict[str, Any]) -> str:
    """Returns the plan as text."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    limit = plan["hbm_limit_bytes_per_chip"]
    of = f" of {_size(limit)}" if limit else ""
    lines = [
        f"{plan['topology']}: {plan['devices']} devices, mesh {mesh}",
        f"batch {plan['global_batch_size']:,} in {plan['micro_batches']} part(s), "
        f"queue of {plan['queue_size']:,}",
        f"fits: {'yes, ' if plan['fits'] else 'NO, at least '}"
        f"{_size(plan['hbm_bytes_per_chip'])}{of} a device",
    ]
    for kind, size in plan["bytes_per_chip"].items():
        lines.append(f"  {kind:18}{_size(size) if size is not None else 'unknown':>12}")
    if "flops" not in plan:
        return "\n".join(lines)
    flops, traffic = plan["flops_per_chip"], plan["hbm_traffic_bytes_per_chip"]
    in_tiles = plan["hbm_traffic_bytes_in_tiles_per_chip"]
    padded = "" if in_tiles == traffic else f" ({_size(in_tiles)} padded to tiles)"
    lines.append(
        f"a step, each device: {flops / 1e12:.3f} TFLOP, {_size(traffic)} of memory traffic{padded}"
    )
    for scope, work in sorted(plan["work_per_chip"].items(), key=lambda item: -item[1]["flops"]):
        lines.append(
            f"  {scope:18}{work['flops'] / 1e12:>10.4f} TFLOP {work['flops'] / flops:>7.2%}"
            f"{_size(work['bytes']):>14}{work['bytes'] / traffic:>8.2%}"
        )
    lines.append(
        f"strategy (all but encoders and optimizer): {plan['strategy_flop_share']:.2%} of the "
        f"FLOPs, {plan['strategy_byte_share']:.2%} of the memory traffic"
    )
    lines.append(
        f"collectives, each device: {_size(plan['collective_bytes_per_chip'])} sent a step"
    )
    for one in plan["collectives"]:
        counted = f"{one['count']:>5} times{_size(one['bytes']):>12} in all"
        lines.append(f"  {one['kind']:20}{one['scope']:18}{counted}")
    if plan["kernels"]:
        lines.append("kernels, each device:")
    for one in plan["kernels"]:
        flops = "unknown FLOPs" if one["flops"] is None else f"{one['flops'] / 1e12:.4f} TFLOP"
        lines.append(f"  {one['scope']:18}{one['count']:>5} times{flops:>16}  {one['kernel']}")
    if "roofline_seconds" not in plan:
        lines.append("no roofline: the peak figures of CPUs are not known")
        return "\n".join(lines)
    bounds = ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in plan["roofline_seconds"].items())
    lines += [
        f"roofline, a bound on this program: {bounds}",
        f"  a step: {plan['roofline_step_seconds'] * 1e3:.1f} ms, bound by "
        f"{plan['roofline_bound_by']}; {plan['roofline_pairs_per_second']:,.0f} pairs/s",
        f"  roofline_mfu: {plan['roofline_mfu']:.1%} of the peak in useful FLOPs "
        f"({plan['useful_flops_per_chip'] / 1e12:.3f} T a device and step)",
    ]
    if plan["roofline_hours"] is None:
        lines.append("  hours: unknown without the number of training pairs, --pairs")
    else:
        lines.append(
            f"  {plan['epochs']:g} epochs of {plan['training_pairs']:,} pairs "
            f"({plan['steps_per_epoch']:,} steps): {plan['roofline_hours']:.2f} hours"
        )
    return "\n".join(lines)


def _size(count):
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"

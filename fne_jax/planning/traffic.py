"""Bytes that single instructions read and write of the main memory.

Slices are read, and updates in place written, without the rest of their array. Arrays in the
memory on the chip, where XLA puts what it needs soon, are no traffic; moving them there is. A
kernel is taken to read all that it is given once: one whose blocks do not hold all keys and values
reads them again for each block of queries.
"""

from __future__ import annotations

import collections

from fne_jax.planning import operations
from fne_jax.planning.hlo import MAIN_MEMORY, Array, Computation, Instruction, Module

# Neither read nor write: they name, group or wait for what is there.
_FREE = frozenset(
    """
    parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id
    opt-barrier while conditional call async-start async-update add-dependency
    """.split()  # noqa: SIM905 a list of strings is not easier to read
)
_FREE_TARGETS = ("AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast")
# Communications; one that overlaps with other work is written into each of its fusions.
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
# Opcodes that write a part of their first operand in place, and which operand the part is.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def main_memory(
    module: Module, computation: Computation, instruction: Instruction
) -> collections.Counter[str]:
    """Returns the bytes that an instruction reads and writes, those of what it calls left out.

    The computation is not a fused one, whose fusion has its traffic.

    Returns:
      Bytes by the `op_name` of what reads or writes them, where a fusion joins several; "" for the
      instruction itself.
    """
    opcode = instruction.opcode
    if (
        opcode in _FREE
        or opcode.endswith("-done")
        or any(target in instruction.attributes for target in _FREE_TARGETS)
    ):
        return collections.Counter()
    if opcode == "fusion":
        return _fusion_traffic(module, computation, instruction)
    operands = [computation.instructions[name].arrays for name in instruction.operands]
    if opcode in ("copy-start", "slice-start"):
        # Their outputs are the destination, the source and a flag.
        ends = instruction.arrays[:2]
        moved = min(array.bytes for array in ends)
        total = sum(moved for array in ends if array.space == MAIN_MEMORY)
    elif opcode in _SLICES:
        read = instruction.arrays[0].bytes if _main_bytes(operands[0]) else 0
        total = read + _main_bytes(instruction.arrays)
    elif opcode in _UPDATES:
        update = operands[_UPDATES[opcode]]
        written = update[0].bytes if _main_bytes(operands[0]) else 0
        total = _main_bytes(update) + written
    elif opcode.endswith("-start") and opcode != "all-reduce-start":
        total = _main_bytes(instruction.arrays)  # lists what it takes beside what it gives
    else:
        total = sum(map(_main_bytes, operands)) + _main_bytes(operations.results(instruction))
    return collections.Counter({"": total})


def _fusion_traffic(module, computation, instruction):
    fused = module.computations[instruction.called("calls")]
    total = collections.Counter()
    # What such a fusion hands on, and the collective itself, are counted where that starts.
    handed_on = _handed_on(fused)
    for number, name in enumerate(instruction.operands):
        array, *_ = computation.instructions[name].arrays or (Array("token", ()),)
        if array.space == MAIN_MEMORY and fused.parameters[number].name not in handed_on:
            parameter = fused.parameters[number].name
            read = _read_bytes(module, fused, parameter)
            reader = next((user.op_name for user in fused.users[parameter]), "")
            total[reader] += array.bytes if read is None else min(read, array.bytes)
    root = fused.instructions[fused.root]
    results = [fused.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(instruction.arrays):
        total[""] += _main_bytes(instruction.arrays)
        return total
    for result, array in zip(results, instruction.arrays, strict=True):
        if array.space == MAIN_MEMORY and result.name not in handed_on:
            written = _written_bytes(module, fused, result)
            total[result.op_name] += min(written, array.bytes)
    return total


def _handed_on(fused):
    """Returns the names of collectives within a fusion, and of all that they alone touch."""
    collectives = {
        instruction.name
        for instruction in fused.instructions.values()
        if instruction.opcode in COLLECTIVES and "chain_id=" in instruction.attributes
    }
    if not collectives:
        return collectives
    untouched = {
        parameter.name
        for parameter in fused.parameters.values()
        if all(u.name in collectives | {fused.root} for u in fused.users[parameter.name])
    }
    return collectives | untouched


def _read_bytes(module, computation, name):
    """Returns what a fused computation reads of an operand; None for all of it."""
    if name == computation.root:
        return None
    total = 0
    for user in computation.users[name]:
        part = None
        if user.opcode in _SLICES and user.operands[0] == name:
            part = user.arrays[0].bytes
        elif user.opcode in _UPDATES and user.operands.index(name) == 0:
            part = 0  # written in place
        elif user.opcode == "bitcast":
            part = _read_bytes(module, computation, user.name)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")]
            parameter = inner.parameters[user.operands.index(name)].name
            renamed = _source_of_bitcasts(inner, inner.root) == parameter
            where = (computation, user.name) if renamed else (inner, parameter)
            part = _read_bytes(module, *where)
        if part is None:
            return None
        total += part
    return total


def _written_bytes(module, computation, result):
    """Returns what a fused computation writes of one of its results."""
    if result.opcode in _UPDATES:
        update = result.operands[_UPDATES[result.opcode]]
        return computation.instructions[update].arrays[0].bytes
    if result.opcode == "bitcast":
        return _written_bytes(module, computation, computation.instructions[result.operands[0]])
    if result.opcode == "fusion":
        inner = module.computations[result.called("calls")]
        if inner.instructions[inner.root].opcode != "tuple":
            return _written_bytes(module, inner, inner.instructions[inner.root])
    return result.arrays[0].bytes


def _source_of_bitcasts(computation, name):
    while computation.instructions[name].opcode == "bitcast":
        name = computation.instructions[name].operands[0]
    return name


def _main_bytes(arrays):
    return sum(array.bytes for array in arrays if array.space == MAIN_MEMORY)

"""Floating-point operations of single instructions."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from fne_jax.planning import kernels
from fne_jax.planning.hlo import Array, Computation, Instruction

# One operation for each element of the output; other opcodes only move data.
_ELEMENTWISE = frozenset(
    """
    abs add and atan2 cbrt ceil clamp compare cosine divide erf exponential exponential-minus-one
    floor log log-plus-one logistic maximum minimum multiply negate not or power remainder
    round-nearest-afz round-nearest-even rsqrt select shift-left shift-right-arithmetic
    shift-right-logical sign sine sqrt subtract tan tanh xor
    """.split()  # noqa: SIM905 a list of fifty strings is not easier to read
)


class Float32(NamedTuple):
    """The time of float32's matrix products on a device.

    Attributes:
      default: Times as long as a product of bfloat16, at the default precision.
      highest: Times as long at the highest precision.
    """

    default: float
    highest: float


# A TPU's matrix unit takes float32 as bfloat16, and at the highest precision in six parts.
TPU_FLOAT32 = Float32(1, 6)


class Operations(NamedTuple):
    """What an instruction computes each time.

    Attributes:
      flops: Operations, a multiplication and an addition as two.
      matrix_passes: Those of matrix products alone, by the time that they take: as many as a device
        does of bfloat16 meanwhile.
    """

    flops: int
    matrix_passes: float = 0


def count(
    computation: Computation, instruction: Instruction, float32: Float32 = TPU_FLOAT32
) -> Operations:
    """Returns the operations of an instruction, those of what it calls left out.

    Args:
      computation: The computation that holds the instruction.
      instruction: The instruction.
      float32: How long the device takes over products of float32.
    """
    opcode = instruction.opcode
    operands = [computation.instructions[name].arrays for name in instruction.operands]
    if opcode in ("dot", "convolution"):
        flops_of = _dot_flops if opcode == "dot" else _convolution_flops
        flops = flops_of(instruction, *(arrays[0] for arrays in operands))
        return Operations(flops, flops * _passes(instruction, operands, float32))
    if opcode == "custom-call":
        found = kernels.products(instruction, [arrays[0] for arrays in operands if arrays])
        if found is None:
            return Operations(0)
        return Operations(found.flops, found.computed * _passes(instruction, operands, float32))
    if opcode in _ELEMENTWISE:
        return Operations(instruction.arrays[0].size)
    if opcode in ("reduce", "reduce-window"):
        # Of windows too: they are cumulative sums, and sums that are broadcast again.
        return Operations(operands[0][0].size)
    return Operations(0)


def _passes(instruction, operands, float32):
    if re.search("operand_precision.*highest", instruction.attributes, re.IGNORECASE):
        return float32.highest
    left_and_right = {arrays[0].dtype for arrays in operands[:2]}
    return float32.default if left_and_right == {"f32"} else 1


def _dot_flops(instruction: Instruction, left: Array, right: Array) -> int:
    del right
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = math.prod(left.dims[int(d)] for d in dims.group(1).split(",") if d) if dims else 1
    return 2 * instruction.arrays[0].size * contracted


def _convolution_flops(instruction: Instruction, left: Array, right: Array) -> int:
    """Counts the products of a convolution; TPUs write every matrix product as one.

    Positions in padding or between dilated inputs are no work: a batched product is written as a
    dilated window of which one position holds an input.
    """
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left_labels, right_labels, out_labels = labels.groups()
    output = instruction.arrays[0]
    features = right.dims[right_labels.index("i")]
    total = output.dims[out_labels.index("b")] * output.dims[out_labels.index("f")] * features
    for place, label in enumerate(sorted(c for c in out_labels if c.isdigit())):

        def of(name, default, place=place):
            return int(fields[name].split("x")[place]) if name in fields else default

        low = int(fields["pad"].split("x")[place].split("_")[0]) if "pad" in fields else 0
        total *= _pairs_in_window(
            inputs=left.dims[left_labels.index(label)],
            outputs=output.dims[out_labels.index(label)],
            window=of("size", 1),
            stride=of("stride", 1),
            low=low,
            input_dilation=of("lhs_dilate", 1),
            window_dilation=of("rhs_dilate", 1),
        )
    return 2 * total


def _pairs_in_window(*, inputs, outputs, window, stride, low, input_dilation, window_dilation):
    extent = (inputs - 1) * input_dilation + 1
    pairs = 0
    for output in range(outputs):
        start = output * stride - low
        positions = range(start, start + window * window_dilation, window_dilation)
        pairs += sum(0 <= p < extent and p % input_dilation == 0 for p in positions)
    return pairs

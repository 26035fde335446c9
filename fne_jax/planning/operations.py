"""Floating-point operations of single instructions, kernels among them.

Programs call kernels by name and do not show the inside of them. Known are the matrix products of
cuBLAS, the fused attention of cuDNN, and the flash and splash attention that JAX ships as Pallas
kernels for TPUs. The softmax between the products is not counted. A kernel is given sequences
padded to a length that it takes. A scope of the name `attention_577x577`, queries and tokens, says
how long they are without.
"""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

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

_CUBLAS = "__cublas$"
_CUDNN_ATTENTION = "__cudnn$fmha"
_PALLAS = "tpu_custom_call"
# The scopes of JAX's Pallas kernels of attention; those of the backward pass lie within the others.
_PALLAS_BACKWARD = re.compile(r"flash_mha_bwd_|splash_m[hq]a_dq|splash_m[hq]a_dkv")
_PALLAS_FORWARD = re.compile(r"\bflash_attention\b|splash_m[hq]a_fwd")
_LENGTHS = re.compile(r"(?<!\w)attention_(\d+)x(\d+)(?!\w)")
_FLOATS = ("bf16", "f16", "f32")
_BYTES = ("s8", "u8")
# Forwards: the scores, and the weights times the values. Backwards: the scores again, the gradient
# of the weights, and one product for the gradient of each of query, key and value.
_SHARED_PRODUCTS = 2


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


def count(
    computation: Computation, instruction: Instruction, float32: Float32 = TPU_FLOAT32
) -> tuple[int, float]:
    """Returns `flops` and `matrix_passes` of an instruction each time, as `accounting.Work` has.

    Those of what it calls are left out.
    """
    opcode = instruction.opcode
    operands = [computation.instructions[name].arrays for name in instruction.operands]
    if opcode in ("dot", "convolution"):
        flops_of = _dot_flops if opcode == "dot" else _convolution_flops
        flops = flops_of(instruction, *(arrays[0] for arrays in operands))
        return flops, flops * _passes(instruction, operands, float32)
    if opcode == "custom-call":
        flops, computed = _kernel_flops(instruction, [arrays[0] for arrays in operands if arrays])
        return flops, computed * _passes(instruction, operands, float32) if computed else 0
    if opcode in _ELEMENTWISE:
        return instruction.arrays[0].size, 0
    # Of windows too: they are cumulative sums, and sums that are broadcast again.
    return operands[0][0].size if opcode in ("reduce", "reduce-window") else 0, 0


def _passes(instruction, operands, float32):
    if re.search("operand_precision.*highest", instruction.attributes, re.IGNORECASE):
        return float32.highest
    left_and_right = {arrays[0].dtype for arrays in operands[:2]}
    return float32.default if left_and_right == {"f32"} else 1


def _dot_flops(instruction: Instruction, left: Array, _: Array) -> int:
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


def kernel(instruction: Instruction) -> str | None:
    """Returns the name of what an instruction calls, as `__cublas$gemm`; None if it calls nothing.

    For a Pallas kernel, which has no name of its own there, it is the last scope. Calls that the
    TPU's compiler makes by itself have names as `AllocateBuffer`, and are none.
    """
    if instruction.opcode != "custom-call":
        return None
    name = re.search(r'custom_call_target="([^"]*)"', instruction.attributes).group(1)
    if name == _PALLAS:
        return instruction.op_name.removesuffix("/pallas_call").rpartition("/")[2] or name
    return None if name[:1].isupper() else name


def results(instruction: Instruction) -> tuple[Array, ...]:
    """Returns the outputs of a call without the room to work in that cuBLAS and cuDNN list last."""
    arrays = instruction.arrays
    given = re.match(r"__cublas\$|__cudnn\$", kernel(instruction) or "")
    return arrays[:-1] if given and len(arrays) > 1 and arrays[-1].dtype in _BYTES else arrays


def _kernel_flops(instruction: Instruction, operands: list[Array]) -> tuple[int, int]:
    """Returns the operations of a call's matrix products, 0 if it is no kernel that is known.

    Returns:
      Those without padding, if that is known, and all that the kernel computes.
    """
    name = kernel(instruction) or ""
    if name.startswith(_CUBLAS):
        contracted = _numbers(instruction, "lhs_contracting_dimensions")
        flops = 2 * instruction.arrays[0].size * math.prod(operands[0].dims[d] for d in contracted)
        return flops, flops
    if name.startswith(_CUDNN_ATTENTION):
        batch, heads, queries, tokens = _numbers(instruction, "dimensions")
        gradients = 3 if "Backward" in name else 0
        width = batch * heads * operands[0].dims[-1]
        return _attention(instruction, gradients, queries, tokens, width)
    if f'custom_call_target="{_PALLAS}"' in instruction.attributes:
        return _pallas(instruction, operands)
    return 0, 0


def _pallas(instruction, operands):
    backward = _PALLAS_BACKWARD.search(instruction.op_name)
    if not backward and not _PALLAS_FORWARD.search(instruction.op_name):
        return 0, 0
    # What comes before describes blocks of the mask; all dimensions but the last two are batches.
    query, key = [array for array in operands if array.dtype in _FLOATS][:2]
    # Results are [..., length, width]; what is given may be [..., width, length].
    mixed = [
        array
        for array in instruction.arrays
        if array.dtype == query.dtype and len(array.dims) >= len(query.dims)
    ]
    width = mixed[0].dims[-1]
    queries, tokens = (math.prod(array.dims[-2:]) // width for array in (query, key))
    gradients = len(mixed) if backward else 0
    return _attention(instruction, gradients, queries, tokens, query.size // queries)


def _attention(instruction, gradients, queries, tokens, width):
    """Returns the products over all batches and heads, whose widths together are `width`."""
    one = 2 * (_SHARED_PRODUCTS + gradients) * width
    lengths = _LENGTHS.findall(instruction.op_name)
    true_queries, true_tokens = map(int, lengths[-1]) if lengths else (queries, tokens)
    return one * true_queries * true_tokens, one * queries * tokens


def _numbers(instruction, field):
    """Returns the first list of numbers of a name in what configures a call."""
    listed = re.search(rf'"{field}":\s*(\[[^\]]*\])', instruction.attributes)
    return [int(number) for number in json.loads(listed.group(1))]

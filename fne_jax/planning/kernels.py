"""Matrix products within kernels, which programs call by name and do not show the inside of.

Known are the products of cuBLAS, the fused attention of cuDNN, and the flash and splash attention
that JAX ships as Pallas kernels for TPUs. The softmax between the products is not counted.

A kernel is given sequences padded to a length that it takes. A scope of the name
`attention_577x577`, queries and tokens, says how long they are without.
"""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

from fne_jax.planning.hlo import Array, Instruction

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


class Products(NamedTuple):
    """The matrix products of a kernel.

    Attributes:
      flops: Operations, a multiplication and an addition as two, without padding if that is known.
      computed: All that the kernel computes, padding too.
    """

    flops: int
    computed: int


def target(instruction: Instruction) -> str | None:
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
    given = re.match(r"__cublas\$|__cudnn\$", target(instruction) or "")
    return arrays[:-1] if given and len(arrays) > 1 and arrays[-1].dtype in _BYTES else arrays


def products(instruction: Instruction, operands: list[Array]) -> Products | None:
    """Returns the matrix products of a call, or None if it is no kernel that is known.

    Args:
      instruction: The call.
      operands: What it is given.
    """
    name = target(instruction) or ""
    if name.startswith(_CUBLAS):
        contracted = _numbers(instruction, "lhs_contracting_dimensions")
        flops = 2 * instruction.arrays[0].size * math.prod(operands[0].dims[d] for d in contracted)
        return Products(flops, flops)
    if name.startswith(_CUDNN_ATTENTION):
        batch, heads, queries, tokens = _numbers(instruction, "dimensions")
        gradients = 3 if "Backward" in name else 0
        width = batch * heads * operands[0].dims[-1]
        return _attention(instruction, gradients, queries, tokens, width)
    if f'custom_call_target="{_PALLAS}"' in instruction.attributes:
        return _pallas(instruction, operands)
    return None


def _pallas(instruction, operands):
    backward = _PALLAS_BACKWARD.search(instruction.op_name)
    if not backward and not _PALLAS_FORWARD.search(instruction.op_name):
        return None
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
    return Products(one * true_queries * true_tokens, one * queries * tokens)


def _numbers(instruction, field):
    """Returns the first list of numbers of a name in what configures a call."""
    listed = re.search(rf'"{field}":\s*(\[[^\]]*\])', instruction.attributes)
    return [int(number) for number in json.loads(listed.group(1))]

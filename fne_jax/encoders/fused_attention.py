"""Attention by kernels that never store the scores, as JAX ships them: cuDNN's and Pallas's.

Both refuse lengths that images have (577 tokens, with the class token), so tokens are padded to a
length that the kernel takes, and the padding is hidden from every query.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Under this name `remat` finds what the kernel of Pallas gives its backward pass.
KERNEL_OUTPUT = "attention_kernel"
# cuDNN's backward pass refuses odd lengths beside a mask; its tiles are of 64 and 128 tokens.
_CUDNN_MULTIPLE = 64
# Lanes of a TPU's vector registers, of which the kernel's blocks are multiples.
_LANES = 128
# Scores of a block take 1.6 MB of the 16 MB of memory on the chip that a kernel of a v5e has, and
# there are a few such arrays; blocks of all 640 tokens, as of 577 padded, compile in both
# directions, and each array is then read once.
_MAX_BLOCK = 640


def padded(multiple: int) -> Callable:
    """Decorates a kernel that takes lengths which `multiple` divides, so that it takes any.

    The kernel is given what `attend` takes, padded, and the number of tokens that are real; it
    returns the mixture for all queries, the padded ones too.
    """

    def decorate(kernel):
        @functools.wraps(kernel)
        def attention(query, key, value, mask, *, causal=False):
            queries, tokens = query.shape[1], key.shape[1]
            padded_query, key, value = (_pad(x, multiple) for x in (query, key, value))
            mask = None if mask is None else _pad(mask, multiple)
            # The plan reads the lengths from this name, since a compiled kernel shows those with
            # padding.
            with jax.named_scope(f"attention_{queries}x{tokens}"):
                out = kernel(padded_query, key, value, mask, causal=causal, tokens=tokens)
                return out[:, :queries]

        return attention

    return decorate


def _pad(array, multiple):
    """Returns the array with zeros after its second dimension."""
    widths = [(0, 0)] * array.ndim
    widths[1] = (0, -array.shape[1] % multiple)
    return jnp.pad(array, widths)


@padded(_CUDNN_MULTIPLE)
def cudnn_attention(query, key, value, mask, *, causal, tokens):
    """Computes `attend` by cuDNN's fused kernel (GPUs, half precision)."""
    lengths = None
    if mask is not None:
        # In full, since the kernel takes no row for all queries. A mask may hide any token, so
        # lengths would not say it.
        shape = (len(query), 1, query.shape[1], key.shape[1])
        mask = jnp.broadcast_to(mask[:, None, None], shape)
    elif tokens != key.shape[1]:
        lengths = jnp.full(len(query), tokens, jnp.int32)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


@padded(_LANES)
def splash_attention(query, key, value, mask, *, causal, tokens):
    """Computes `attend` by the Pallas kernel "splash attention" (TPUs, bfloat16).

    Its backward pass is one kernel, that reads each array once and the sums of the softmax as one
    number a query. JAX's "flash attention" for TPUs takes two kernels and 128 copies of that
    number: for 16 images of 577 tokens, compiled for a v5e, it moves 1.08 to 1.66 GB of main
    memory in both directions, by its blocks, and the plain products 2.09 GB; splash attention 0.32
    to 0.48 GB.
    """
    # Here, because the import takes a second that only TPUs need.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    batch, queries, heads, dim = query.shape
    length = key.shape[1]
    block_q, block_kv = _block(queries), _block(length)
    # Tokens in the lanes, of which heads of 64 would fill half. For 64 images in both directions
    # this moves 2.78 GB; with any of the three the other way it is 2.89 to 3.12 GB.
    layout = splash_attention_kernel.QKVLayout.SEQ_MINOR
    kind = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    attention = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([kind((queries, length))] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True,
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        residual_checkpoint_name=KERNEL_OUTPUT,
    )
    segments = None
    if mask is None and tokens != length:
        mask = jnp.broadcast_to(jnp.arange(length) < tokens, (batch, length))
    if mask is not None:
        # Queries see the tokens of their own segment: 1, and 0 for what is hidden.
        segments = splash_attention_kernel.SegmentIds(
            jnp.ones((batch, queries), jnp.int32), mask.astype(jnp.int32)
        )
    # The kernel knows neither batches nor a scale.
    query, key, value = (x.swapaxes(1, 2) for x in (query * dim**-0.5, key, value))
    return jax.vmap(attention)(query, key, value, segments).swapaxes(1, 2)


def _block(length):
    """Returns the largest block that divides a length."""
    return max(size for size in range(_LANES, _MAX_BLOCK + 1, _LANES) if length % size == 0)


def on_each_device(
    attention: Callable[..., jax.Array], mesh: jax.sharding.Mesh | None
) -> Callable[..., jax.Array]:
    """Returns attention that each device computes for its own rows of the batch.

    The compiler cannot split a kernel by itself. `mesh` are the devices, over all axes of which
    batches are split; None for one device.
    """
    if mesh is None or mesh.size == 1:
        return attention

    @functools.wraps(attention)
    def run(query, key, value, mask):
        if jax.sharding.get_abstract_mesh().manual_axes:
            return attention(query, key, value, mask)  # of a device's own rows already
        # A batch that cannot be split is small, such as the one row that parameters start from.
        axes = mesh.axis_names if len(query) % mesh.size == 0 else None
        rows = jax.sharding.PartitionSpec(axes)
        # The kernels do not say over which axes their results vary, so that goes unchecked.
        split = jax.shard_map(attention, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        return split(query, key, value, mask)

    return run

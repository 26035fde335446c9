"""Implementations of softmax attention, which compute the same at different speeds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fne_jax.encoders.fused_attention import cudnn_attention, on_each_device, splash_attention
from fne_jax.errors import UserError

AUTO = "auto"

# Fewest queries at which looping pays on a CPU. Forward and backward, [8, tokens, 12, 64] float32,
# two cores of a Xeon, in seconds of "xla" and of "head_loop": 0.09 and 0.11 at 197 tokens, 0.137
# and 0.136 at 257, 0.63 and 0.42 at 401, 0.82 and 0.54 at 577. In bfloat16 both take 1.2 at 577.
_LOOP_QUERIES = 256
# Fewest queries at which fused kernels are taken. Main memory that attention moves forward and
# backward, [64, tokens, 12, 64] bfloat16 compiled for one v5e, in GB of "xla" and of "splash": 0.02
# and 0.10 at 30 tokens, 0.06 and 0.18 at 77, 0.18 and 0.22 at 128, 1.08 and 0.64 at 197, 1.88 and
# 1.18 at 257.
_FUSED_QUERIES = 160

_HIDDEN = jnp.finfo(jnp.float32).min


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Returns the precision of products of this dtype: all bits of float32, else the default.

    By default TPUs take float32 as bfloat16, and GPUs as TensorFloat-32.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    bias: jax.Array | None = None,
    causal: bool = False,
    implementation: str = AUTO,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """Returns softmax(query key^T / sqrt(dim) + bias) value, with a float32 softmax.

    A query that may look nowhere weighs all tokens alike; fused kernels give it some finite value.

    Args:
      query: [batch, queries, heads, dim] float array.
      key: [batch, tokens, heads, dim] array of the same dtype, as is the value.
      value: What is mixed.
      mask: [batch, tokens] bool, False where no query must look; or None.
      bias: [heads, queries, tokens] float32 array, which "xla" alone can add; or None.
      causal: Whether query i must not look at tokens after token i; there are then as many queries
        as tokens.
      implementation: A key of `ATTENTIONS`, or "auto" for what `resolve` chooses.
      mesh: The devices that the program is for, over all axes of which batches are split; None for
        the default device alone.

    Returns a [batch, queries, heads, dim] array in the dtype of `value`. Raises UserError if the
    implementation cannot run there, or adds no bias.
    """
    if bias is not None:
        if implementation not in (AUTO, "xla"):
            raise UserError(
                f"attention is {implementation!r}, which cannot add this encoder's bias of "
                "relative positions; expected auto or xla"
            )
        return xla_attention(query, key, value, mask, bias=bias, causal=causal)
    chosen = resolve(implementation, queries=query.shape[1], dtype=query.dtype, mesh=mesh)
    run = functools.partial(ATTENTIONS[chosen], causal=causal)
    if chosen in _FUSED:
        device, dtype = _devices(mesh)[0], query.dtype
        if not _runs(chosen, device, dtype):
            platform, dtypes, capability = _FUSED[chosen]
            least = f" of compute capability {capability} or above" if capability else ""
            raise UserError(
                f"attention is {chosen!r}, which takes a {platform.upper()}{least} and "
                f"{' or '.join(dtypes)}; this is {device.platform} and {dtype}; expected "
                "auto or xla"
            )
        run = on_each_device(run, mesh)
    return run(query, key, value, mask)


def resolve(
    implementation: str, *, queries: int, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> str:
    """Returns the key of `ATTENTIONS` that a name stands for.

    For "auto" that is, where queries are many, "head_loop" on a single CPU, and in half precision
    "splash" on TPUs and "cudnn" on GPUs; else it is "xla". On CPUs it was measured that this is
    faster. On TPUs it is counted, in compiled programs, that less memory is moved, which bounds the
    step (`python -m fne_jax.plan`); no time was measured there, nor on GPUs.

    `queries` is the number of query tokens, `dtype` the compute dtype, and `mesh` as of `attend`.
    """
    if implementation != AUTO:
        return implementation
    device, count = _devices(mesh)
    if device.platform == "cpu":
        # Over several devices each would run a loop over the whole batch.
        return "head_loop" if count == 1 and queries >= _LOOP_QUERIES else "xla"
    # Without a mesh nothing says how several devices share a batch.
    if queries < _FUSED_QUERIES or (mesh is None and count > 1):
        return "xla"
    return next((name for name in _FUSED if _runs(name, device, dtype)), "xla")


def _devices(mesh):
    """Returns one of the devices that a program is for, and their number."""
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    return devices[0], len(devices)


def _runs(name, device, dtype):
    """Returns whether a fused kernel runs on a device in a dtype."""
    platform, dtypes, capability = _FUSED[name]
    found = float(getattr(device, "compute_capability", capability))
    return device.platform == platform and jnp.dtype(dtype).name in dtypes and found >= capability


def xla_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    bias: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:
    """Computes `attend` for all heads at once, as two batched products."""
    seen = _seen(mask, query.shape[1], causal)
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    precision = precision_of(query.dtype)
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    scores *= query.shape[-1] ** -0.5
    if bias is not None:
        scores += bias[None]
    if seen is not None:
        scores = jnp.where(seen[:, None], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value, precision=precision).swapaxes(1, 2)


def _seen(mask, queries, causal):
    """Returns [batch or 1, queries or 1, tokens] bool, False where a query must not look; or None.

    It takes what `attend` does; if attention is causal there are as many queries as tokens.
    """
    seen = None if mask is None else mask[:, None]
    if causal:
        earlier = jnp.tril(jnp.ones((1, queries, queries), bool))
        seen = earlier if seen is None else earlier & seen
    return seen


def head_loop_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    causal: bool = False,
) -> jax.Array:
    """Computes `attend` for one head of one example after the other.

    The scores of one head stay in a CPU's cache, and a plain product runs several times as fast
    there as a batched one. The backward pass computes the scores again, so that none are kept.
    """
    batch, queries, heads, dim = query.shape
    seen = _seen(mask, queries, causal)
    if seen is not None:
        seen = jnp.broadcast_to(seen, (batch, *seen.shape[1:]))

    def one(head):
        index, *arrays = head
        return _one_head(*arrays, None if seen is None else seen[index // heads])

    # One loop: two, one within the other, were a tenth slower.
    arrays = (x.swapaxes(1, 2).reshape(batch * heads, -1, dim) for x in (query, key, value))
    out = jax.lax.map(one, (jnp.arange(batch * heads), *arrays))
    return out.reshape(batch, heads, -1, dim).swapaxes(1, 2)


# Scores are held as [tokens, queries]: sums and maxima over the leading axis are vectorised on a
# CPU, those over the last one are not.


@jax.custom_vjp
def _one_head(query, key, value, mask):
    """Returns [queries, dim] of a query of that shape, and a key and value of [tokens, dim]."""
    return _one_head_forward(query, key, value, mask)[0]


def _one_head_forward(query, key, value, mask):
    scores = _scores(query, key, mask)
    top = scores.max(axis=0, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=0, keepdims=True)
    mixed = _transposed_product(weights.astype(value.dtype), value, jnp.float32)
    out = (mixed / total.T).astype(value.dtype)
    return out, (query, key, value, mask, out, top, total)


def _one_head_backward(residuals, grad):
    query, key, value, mask, out, top, total = residuals
    dtype = value.dtype
    weights = jnp.exp(_scores(query, key, mask) - top) / total
    # The product of the softmax's Jacobian, diag(w) - w w^T, with the weights' gradient.
    shared = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=1)[None]
    grad_weights = _product(value, grad.T, jnp.float32)
    grad_scores = weights * (grad_weights - shared)
    if mask is not None:
        grad_scores = jnp.where(mask.T, grad_scores, 0.0)
    grad_scores = (grad_scores * query.shape[1] ** -0.5).astype(dtype)
    grad_query = _transposed_product(grad_scores, key)
    grad_key = _product(grad_scores, query)
    grad_value = _product(weights.astype(dtype), grad)
    return grad_query, grad_key, grad_value, None


_one_head.defvjp(_one_head_forward, _one_head_backward)


def _scores(query, key, mask):
    scores = _product(key, query.T, jnp.float32) * query.shape[1] ** -0.5
    return scores if mask is None else jnp.where(mask.T, scores, _HIDDEN)


def _product(a, b, dtype=None):
    return jnp.dot(a, b, precision=precision_of(a.dtype), preferred_element_type=dtype)


def _transposed_product(a, b, dtype=None):
    """Returns a.T @ b."""
    return jax.lax.dot_general(
        a, b, (((0,), (0,)), ((), ())), precision_of(a.dtype), preferred_element_type=dtype
    )


# By the names that `config.encoder.attention` gives them.
ATTENTIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": xla_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
    "head_loop": head_loop_attention,
}
# What the fused ones run on: a platform, the dtypes, and of GPUs the least compute capability.
_FUSED = {
    "cudnn": ("gpu", ("bfloat16", "float16"), 8.0),
    # In float32 it would not keep all bits of its products.
    "splash": ("tpu", ("bfloat16",), 0.0),
}

"""Implementations of softmax attention, which compute the same at different speeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fne_jax.errors import UserError

AUTO = "auto"

# Fewest queries at which looping pays on a CPU. Forward and backward, [8, tokens, 12, 64] float32,
# two cores of a Xeon, in seconds of "xla" and of "head_loop": 0.09 and 0.11 at 197 tokens, 0.137
# and 0.136 at 257, 0.63 and 0.42 at 401, 0.82 and 0.54 at 577. In bfloat16 both take 1.2 at 577.
_LOOP_QUERIES = 256

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
    implementation: str = AUTO,
) -> jax.Array:
    """Returns softmax(query key^T / sqrt(dim)) value, with a float32 softmax.

    A query whose mask is False everywhere weighs all tokens alike, except in "cudnn".

    Args:
      query: [batch, queries, heads, dim] float array.
      key: [batch, tokens, heads, dim] array of the same dtype.
      value: [batch, tokens, heads, dim] array of the same dtype.
      mask: [batch, 1 or queries, tokens] bool, False where a query must not look; or None.
      implementation: A key of `ATTENTIONS`, or "auto" for the fastest on this kind of device.

    Returns:
      A [batch, queries, heads, dim] array in the dtype of `value`.

    Raises:
      UserError: if there is no such implementation, or it cannot run here.
    """
    chosen = resolve(implementation, queries=query.shape[1])
    return ATTENTIONS[chosen](query, key, value, mask)


def resolve(implementation: str, *, queries: int) -> str:
    """Returns the key of `ATTENTIONS` that a name stands for on the default backend.

    "auto" is "head_loop" for long sequences on a single CPU, and "xla" elsewhere.

    Args:
      implementation: A key of `ATTENTIONS`, or "auto".
      queries: Number of query tokens.

    Raises:
      UserError: if there is no such implementation.
    """
    check_name(implementation, "attention")
    if implementation != AUTO:
        return implementation
    # Over several devices each would run a loop over the whole batch. "cudnn" was not measured.
    looping = jax.default_backend() == "cpu" and jax.device_count() == 1
    return "head_loop" if looping and queries >= _LOOP_QUERIES else "xla"


def check_name(implementation: str, field: str) -> None:
    """Raises UserError, naming the field, unless the name is "auto" or a key of `ATTENTIONS`."""
    if implementation != AUTO and implementation not in ATTENTIONS:
        raise UserError(
            f"{field} is {implementation!r}; expected one of {', '.join((AUTO, *ATTENTIONS))}"
        )


def xla_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Computes `attend` for all heads at once, as two batched products."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    precision = precision_of(query.dtype)
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    scores *= query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value, precision=precision).swapaxes(1, 2)


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Computes `attend` by cuDNN's fused kernel, which never stores the scores.

    Raises:
      UserError: if the backend is not a GPU, the dtype is neither bfloat16 nor float16, the mask
        has one row for all queries (as captions' masks have), or a length is odd (as a ViT's with
        its class token is).
    """
    if jax.default_backend() != "gpu":
        raise UserError(
            f"attention is 'cudnn', which runs on GPUs only, and this is {jax.default_backend()}; "
            "expected auto or xla"
        )
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention is 'cudnn', which needs half precision, and the compute dtype is "
            f"{query.dtype}; make it bfloat16, or the attention auto"
        )
    queries, tokens = query.shape[1], key.shape[1]
    if mask is not None and mask.shape[1] != queries:
        raise UserError(
            f"attention is 'cudnn', which takes no mask of one row for all {queries} queries, as "
            "that of captions is; make config.encoder.attention auto or xla"
        )
    if queries % 2 or tokens % 2:
        raise UserError(
            f"attention is 'cudnn', whose gradient needs even lengths, and there are {queries} "
            f"queries and {tokens} tokens; make config.encoder.attention auto or xla"
        )
    mask = None if mask is None else mask[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


def head_loop_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Computes `attend` for one head of one example after the other.

    The scores of one head stay in a CPU's cache, and a plain product runs several times as fast
    there as a batched one. The backward pass computes the scores again, so that none are kept.
    """

    batch, _, heads, dim = query.shape

    def one(head):
        index, *arrays = head
        return _one_head(*arrays, None if mask is None else mask[index // heads])

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
    "head_loop": head_loop_attention,
}

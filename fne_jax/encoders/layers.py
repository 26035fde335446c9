"""What layers are made of: dense products, norms, activations, MLPs and attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fne_jax.encoders.attention import attend, precision_of
from fne_jax.encoders.low_rank import LowRankDense

# Random initialisation follows the original ViT's code rather than BERT's fixed deviation of 0.02,
# which suits a width of 768 but leaves narrow towers nearly silent for their first hundred steps.
KERNEL_INIT = nn.initializers.xavier_uniform(dtype=jnp.float32)


# By the names that Hugging Face's configs give them.
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def layer_norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    """Returns a LayerNorm whose variance is computed exactly (two passes), as PyTorch's is."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def dense(
    width: int, dtype: Any, name: str | None = None, *, use_bias: bool = True, lora_rank: int = 0
) -> nn.Module:
    """Returns a dense layer whose products have all bits of the dtype that they compute in."""
    options = {
        "use_bias": use_bias,
        "dtype": dtype,
        "precision": precision_of(dtype),
        "kernel_init": KERNEL_INIT,
        "name": name,
    }
    return (
        LowRankDense(width, rank=lora_rank, **options) if lora_rank else nn.Dense(width, **options)
    )


def mlp(
    x: jax.Array, hidden_width: int, activation: str, dtype: Any, lora_rank: int = 0
) -> jax.Array:
    """Applies the dense layers `mlp_in` and `mlp_out` of the calling module to hidden states.

    They are [..., width], and come back in the compute dtype. `activation` is a key of
    `ACTIVATIONS`, `lora_rank` as of `Attention`.
    """
    hidden = ACTIVATIONS[activation](dense(hidden_width, dtype, "mlp_in", lora_rank=lora_rank)(x))
    return dense(x.shape[-1], dtype, "mlp_out", lora_rank=lora_rank)(hidden)


class Attention(nn.Module):
    """Multi-head attention.

    Attributes:
      heads: Number of heads; it must divide the width.
      dtype: Compute dtype. The softmax is float32 in any case.
      attend: What mixes the values: `attend`, with its options set.
      key_bias: Whether a bias is added to the keys, as it is to the three other products.
      lora_rank: Rank of the learned changes of the kernels; 0 for none.
    """

    heads: int
    dtype: Any = jnp.float32
    attend: Callable[..., jax.Array] = attend
    key_bias: bool = True
    lora_rank: int = 0

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        mask: jax.Array | None,
        queries: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the mixture of tokens that each query attends to, [batch, queries, width].

        The [batch, tokens, width] hidden states ask themselves unless there are `queries`. The mask
        and the bias are as of `attend`. Raises UserError if the implementation cannot run here.
        """
        width = hidden.shape[-1]
        queries = hidden if queries is None else queries

        def product(x, name, **options):
            return dense(width, self.dtype, name, lora_rank=self.lora_rank, **options)(x)

        def heads_of(x, name, **options):
            out = product(x, name, **options)
            return out.reshape(*x.shape[:2], self.heads, width // self.heads)

        query = heads_of(queries, "query")
        key = heads_of(hidden, "key", use_bias=self.key_bias)
        value = heads_of(hidden, "value")
        biased = {} if bias is None else {"bias": bias}
        mixed = self.attend(query, key, value, mask, **biased).reshape(queries.shape)
        return product(mixed, "output")

"""Low-rank changes of dense layers (LoRA; Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# The names of the two factors, beside those of the layer that they change.
FACTORS = ("lora_in", "lora_out")
_MERGED = "kernel"


class LowRankDense(nn.Dense):
    """A dense layer whose kernel is `kernel + lora_in @ lora_out`.

    The second factor starts at 0, and the layer as it was. The paper's scale, alpha / rank,
    is 1.

    Attributes:
      rank: Number of columns of the first factor and of rows of the second.
    """

    rank: int = 1

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns the [..., features] outputs of [..., width] inputs, in the compute dtype."""
        width, shape = inputs.shape[-1], (self.features,)
        kernel = self.param(_MERGED, self.kernel_init, (width, *shape), jnp.float32)
        init = nn.initializers.normal(width**-0.5, jnp.float32)
        first = self.param(FACTORS[0], init, (width, self.rank))
        second = self.param(FACTORS[1], nn.initializers.zeros, (self.rank, *shape), jnp.float32)
        inputs = inputs.astype(self.dtype)

        def product(x, matrix):
            return jnp.dot(x, matrix.astype(self.dtype), precision=self.precision)

        out = product(inputs, kernel) + product(product(inputs, first), second)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, jnp.float32).astype(self.dtype)
            out += bias.reshape((1,) * (out.ndim - 1) + shape)
        return out


def merge_factors(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters with every pair of factors added to its kernel, in float32.

    Layers may be stacked or not; without factors a tree comes back as it is.
    """
    first, second = FACTORS
    merged = {
        name: merge_factors(part) if isinstance(part, Mapping) else part
        for name, part in params.items()
        if name not in FACTORS
    }
    if first in params:
        change = jnp.matmul(params[first], params[second], precision=jax.lax.Precision.HIGHEST)
        merged[_MERGED] = params[_MERGED] + change
    return merged

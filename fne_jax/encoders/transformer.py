"""The transformer layer that ViT and BERT share, and a stack of them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Random initialisation follows the original ViT's code rather than BERT's fixed deviation of 0.02,
# which suits a width of 768 but leaves narrow towers nearly silent for their first hundred steps.
KERNEL_INIT = nn.initializers.xavier_uniform()


class Attention(nn.Module):
    """Multi-head self-attention with biases on all four projections.

    Attributes:
      heads: number of heads; it must divide the width.
      dtype: compute dtype. The softmax is float32 in any case.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Attends over tokens: [batch, tokens, width] and mask [batch, tokens] -> same shape."""
        batch, tokens, width = hidden.shape

        def heads_of(name):
            out = _dense(width, self.dtype, name)(hidden)
            return out.reshape(batch, tokens, self.heads, width // self.heads).swapaxes(1, 2)

        query, key, value = heads_of("query"), heads_of("key"), heads_of("value")
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
        scores *= (width // self.heads) ** -0.5
        if mask is not None:
            scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, value)
        mixed = mixed.swapaxes(1, 2).reshape(batch, tokens, width)
        return _dense(width, self.dtype, "output")(mixed)


class TransformerLayer(nn.Module):
    """Attention and MLP with residuals, normalised before (ViT) or after (BERT) each.

    Attributes:
      heads: number of attention heads.
      mlp_width: width of the hidden layer of the MLP, with exact (erf) GELU.
      pre_norm: normalise the input of each part rather than the sum after it.
      norm_epsilon: of the LayerNorms.
      dropout: rate on the output of each part.
      dtype: compute dtype.
    """

    heads: int
    mlp_width: int
    pre_norm: bool
    norm_epsilon: float
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, hidden: jax.Array, mask: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, None]:
        """[batch, tokens, width] -> the same and None, the pair that `nn.scan` asks for."""
        width = hidden.shape[-1]

        def attend(x):
            return Attention(self.heads, self.dtype, name="attention")(x, mask)

        def transform(x):
            x = jax.nn.gelu(_dense(self.mlp_width, self.dtype, "mlp_in")(x), approximate=False)
            return _dense(width, self.dtype, "mlp_out")(x)

        for part, name in ((attend, "attention_norm"), (transform, "mlp_norm")):
            norm = layer_norm(self.norm_epsilon, self.dtype, name)
            out = part(norm(hidden) if self.pre_norm else hidden)
            out = nn.Dropout(self.dropout)(out, deterministic=deterministic)
            hidden = hidden + out if self.pre_norm else norm(hidden + out)
        return hidden, None


class TransformerStack(nn.Module):
    """A sequence of layers, optionally scanned (compiled once) and rematerialised.

    Attributes:
      layers: number of layers.
      scan_layers: keep the layers' parameters stacked along a leading axis, under one name.
      remat: recompute activations in the backward pass instead of keeping them.
      heads: see `TransformerLayer`, as all below.
      mlp_width: see `TransformerLayer`.
      pre_norm: see `TransformerLayer`.
      norm_epsilon: see `TransformerLayer`.
      dropout: see `TransformerLayer`.
      dtype: see `TransformerLayer`.
    """

    layers: int
    heads: int
    mlp_width: int
    pre_norm: bool
    norm_epsilon: float
    dropout: float = 0.0
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """[batch, tokens, width] and a [batch, tokens] bool mask or None -> the same shape."""
        layer = TransformerLayer
        if self.remat:
            # `deterministic` (argument 3 with self) must stay a Python bool.
            layer = nn.remat(layer, prevent_cse=not self.scan_layers, static_argnums=(3,))
        sizes = (
            self.heads,
            self.mlp_width,
            self.pre_norm,
            self.norm_epsilon,
            self.dropout,
            self.dtype,
        )
        if self.scan_layers:
            scanned = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=self.layers,
            )
            return scanned(*sizes, name="layers")(hidden, mask, deterministic)[0]
        for index in range(self.layers):
            hidden, _ = layer(*sizes, name=f"layer_{index}")(hidden, mask, deterministic)
        return hidden


def layer_norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    """Returns a LayerNorm whose variance is computed exactly (two passes), as PyTorch's is."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def _dense(width, dtype, name):
    return nn.Dense(
        width,
        dtype=dtype,
        kernel_init=KERNEL_INIT,
        name=name,
    )

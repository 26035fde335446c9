"""SigLIP (Zhai et al. 2023, arXiv 2303.15343), as in Hugging Face's SiglipModel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fne_jax.encoders.transformer import (
    KERNEL_INIT,
    Attention,
    EncoderOutput,
    TextTower,
    dense,
    layer_norm,
    mlp,
)
from fne_jax.encoders.vision_transformer import VisionTower


class SiglipVision(VisionTower, kw_only=True):
    """A ViT without class token, read by a learned probe that attends over the patches."""

    activation: str = "gelu_pytorch_tanh"
    norm_epsilon: float = 1e-6

    @property
    def pooled_dim(self) -> int:
        """The dimension of `pooled`."""
        return self.width

    @nn.compact
    def __call__(self, pixels: jax.Array, *, deterministic: bool = True) -> EncoderOutput:
        """Encodes [batch, height, width, 3] normalised pixels; tokens are patches.

        Raises:
          ValueError: if the pixels are not `image_size` square.
        """
        hidden = self.embed_patches(pixels, class_token=False)
        hidden = self.run_layers(hidden, None, deterministic, pre_norm=True)
        hidden = layer_norm(self.norm_epsilon, self.dtype, "final_norm")(hidden)
        head = _AttentionPooling(
            self.heads,
            self.mlp_width,
            self.activation,
            self.norm_epsilon,
            self.dtype,
            self.attend(),
            name="head",
        )
        return EncoderOutput(hidden, head(hidden))


class SiglipText(TextTower, kw_only=True):
    """A bidirectional transformer, read at its last token.

    The published checkpoints were trained on texts padded to the full length and without a mask,
    so their tokenizers give none.

    Attributes:
      projection_dim: Dimension of `pooled`.
    """

    projection_dim: int
    activation: str = "gelu_pytorch_tanh"
    norm_epsilon: float = 1e-6

    @property
    def pooled_dim(self) -> int:
        """The dimension of `pooled`."""
        return self.projection_dim

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> EncoderOutput:
        """Encodes [batch, tokens] token ids; a mask, of the same shape, hides where it is 0.

        Raises:
          ValueError: if the sequence is longer than `max_length`.
        """
        mask = None if attention_mask is None else attention_mask.astype(bool)
        hidden = self.embed_tokens(input_ids).astype(self.dtype)
        hidden = self.run_layers(hidden, mask, deterministic, pre_norm=True)
        hidden = layer_norm(self.norm_epsilon, self.dtype, "final_norm")(hidden)
        head = dense(self.projection_dim, jnp.float32, "head")
        return EncoderOutput(hidden, head(hidden[:, -1].astype(jnp.float32)))


class _AttentionPooling(nn.Module):
    """One learned query that attends over all tokens, and an MLP with a residual.

    Attributes:
      heads: Number of attention heads.
      mlp_width: Width of the MLP's hidden layer.
      activation: Activation of the MLP, a key of `ACTIVATIONS`.
      norm_epsilon: Epsilon of the LayerNorm.
      dtype: Compute dtype.
      attend: What mixes the values: `attend`, with its options set.
    """

    heads: int
    mlp_width: int
    activation: str
    norm_epsilon: float
    dtype: Any
    attend: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Returns the [batch, width] float32 summary of [batch, tokens, width] hidden states."""
        batch, _, width = hidden.shape
        probe = self.param("probe", KERNEL_INIT, (1, 1, width))
        probe = jnp.broadcast_to(probe.astype(self.dtype), (batch, 1, width))
        attention = Attention(self.heads, self.dtype, self.attend, name="attention")
        pooled = attention(hidden, None, probe)
        normed = layer_norm(self.norm_epsilon, self.dtype, "norm")(pooled)
        pooled = pooled + mlp(normed, self.mlp_width, self.activation, self.dtype)
        return pooled[:, 0].astype(jnp.float32)

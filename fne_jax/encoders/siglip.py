"""SigLIP (Zhai et al. 2023, arXiv 2303.15343), as in Hugging Face's SiglipModel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fne_jax.encoders.bert import TextTower
from fne_jax.encoders.clip import TEXT, VISION
from fne_jax.encoders.layers import KERNEL_INIT, Attention, dense, layer_norm, mlp
from fne_jax.encoders.layouts import DENSE, JOINT, NORM, PATCHES, VALUE
from fne_jax.encoders.transformer import EncoderOutput
from fne_jax.encoders.vision_transformer import VisionTower


class SiglipVision(VisionTower, kw_only=True):
    """A ViT without class token, read by a learned probe that attends over the patches."""

    activation: str = "gelu_pytorch_tanh"
    norm_epsilon: float = 1e-6

    after_layers = ("final_norm", "head")
    pooled_as = "width"

    layout = VISION._replace(
        fixed={**VISION.fixed, "vision_use_head": True},
        weights=(
            *VISION.weights,
            ("patch_embedding", "vision_model.embeddings.patch_embedding", PATCHES),
            ("head/probe", "vision_model.head.probe", VALUE),
            ("head/attention/query", "vision_model.head.attention.in_proj", JOINT),
            ("head/attention/key", "vision_model.head.attention.in_proj", JOINT),
            ("head/attention/value", "vision_model.head.attention.in_proj", JOINT),
            ("head/attention/output", "vision_model.head.attention.out_proj", DENSE),
            ("head/norm", "vision_model.head.layernorm", NORM),
            ("head/mlp_in", "vision_model.head.mlp.fc1", DENSE),
            ("head/mlp_out", "vision_model.head.mlp.fc2", DENSE),
        ),
    )

    def embed(self, inputs: jax.Array) -> jax.Array:
        """Returns the [batch, patches, width] embeddings of pixels."""
        return self.embed_patches(inputs, class_token=False)

    def finish(self, hidden: jax.Array, inputs: Any, mask: Any) -> EncoderOutput:
        """Returns the hidden states after the last LayerNorm, and `pooled` by the probe."""
        del inputs, mask
        hidden = layer_norm(self.norm_epsilon, self.dtype, "final_norm")(hidden)
        head = AttentionPooling(
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

    The published checkpoints were trained on texts padded to the full length and without a mask, so
    their tokenizers give none.
    """

    projection_dim: int
    activation: str = "gelu_pytorch_tanh"
    norm_epsilon: float = 1e-6

    after_layers = ("final_norm", "head")
    pooled_as = "projection_dim"

    layout = TEXT._replace(
        fields={**TEXT.fields, "projection_dim": "projection_size"},
        weights=(*TEXT.weights, ("head", "text_model.head", DENSE)),
    )

    def finish(self, hidden: jax.Array, inputs: Any, mask: Any) -> EncoderOutput:
        """Returns the hidden states after the last LayerNorm, and `pooled` of the last token."""
        del inputs, mask
        hidden = layer_norm(self.norm_epsilon, self.dtype, "final_norm")(hidden)
        head = dense(self.projection_dim, jnp.float32, "head")
        return EncoderOutput(hidden, head(hidden[:, -1].astype(jnp.float32)))


class AttentionPooling(nn.Module):
    """One learned query that attends over all tokens, and an MLP with a residual.

    `attend` is what mixes the values; all else is as of a tower.
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

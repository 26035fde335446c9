"""CLIP (Radford et al. 2021, arXiv 2103.00020), as in Hugging Face's CLIPModel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fne_jax.encoders.bert import TextTower
from fne_jax.encoders.layers import dense, layer_norm
from fne_jax.encoders.layouts import (
    DENSE,
    IMAGE_SIZES,
    NORM,
    PATCH_KERNEL,
    POSITIONS,
    PRODUCT,
    TABLE,
    TEXT_SIZES,
    VECTOR,
    Layout,
)
from fne_jax.encoders.transformer import EncoderOutput
from fne_jax.encoders.vision_transformer import VisionTower

_LAYER = (
    ("attention_norm", "layer_norm1", NORM),
    ("attention/query", "self_attn.q_proj", DENSE),
    ("attention/key", "self_attn.k_proj", DENSE),
    ("attention/value", "self_attn.v_proj", DENSE),
    ("attention/output", "self_attn.out_proj", DENSE),
    ("mlp_norm", "layer_norm2", NORM),
    ("mlp_in", "mlp.fc1", DENSE),
    ("mlp_out", "mlp.fc2", DENSE),
)
# What the towers of a CLIP and a SigLIP have in common.
VISION = Layout(
    fields=IMAGE_SIZES,
    fixed={"num_channels": 3},
    weights=(
        ("position_embedding", "vision_model.embeddings.position_embedding", POSITIONS),
        ("final_norm", "vision_model.post_layernorm", NORM),
    ),
    layer="vision_model.encoder.layers.{}.",
    layer_weights=_LAYER,
)
TEXT = Layout(
    fields=TEXT_SIZES,
    fixed={},
    weights=(
        ("word_embedding", "text_model.embeddings.token_embedding", TABLE),
        ("position_embedding", "text_model.embeddings.position_embedding", TABLE),
        ("final_norm", "text_model.final_layer_norm", NORM),
    ),
    layer="text_model.encoder.layers.{}.",
    layer_weights=_LAYER,
)
# The end token's id that configs of OpenAI's checkpoints name, though their tokenizer's is 49407.
_LEGACY_EOS = 2


class ClipVision(VisionTower, kw_only=True):
    """A ViT with a LayerNorm before the layers, read at its class token, which is projected."""

    projection_dim: int
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5

    after_layers = ("final_norm", "projection")
    pooled_as = "projection_dim"

    layout = VISION._replace(
        fields={**VISION.fields, "projection_dim": "projection_dim"},
        weights=(
            *VISION.weights,
            ("class_token", "vision_model.embeddings.class_embedding", VECTOR),
            ("patch_embedding", "vision_model.embeddings.patch_embedding", PATCH_KERNEL),
            # Spelt so in their files.
            ("embedding_norm", "vision_model.pre_layrnorm", NORM),
            ("projection", "visual_projection", PRODUCT),
        ),
    )

    def embed(self, inputs: jax.Array) -> jax.Array:
        """Returns the [batch, tokens, width] normalised embeddings of pixels, class token first."""
        hidden = self.embed_patches(inputs, class_token=True, patch_bias=False)
        return layer_norm(self.norm_epsilon, self.dtype, "embedding_norm")(hidden)

    def finish(self, hidden: jax.Array, inputs: Any, mask: Any) -> EncoderOutput:
        """Returns the hidden states, and `pooled` of the class token.

        `last_hidden_state` is taken before the last LayerNorm, which is applied to the class token
        alone.
        """
        del inputs, mask
        pooled = layer_norm(self.norm_epsilon, jnp.float32, "final_norm")(hidden[:, 0])
        return EncoderOutput(hidden, _project(pooled, self.projection_dim))


class ClipText(TextTower, kw_only=True):
    """A causal transformer, read at the token that ends the text, which is projected.

    Of the ids of that token 2, which OpenAI's checkpoints state, stands for the highest in a text.
    """

    projection_dim: int
    eos_token_id: int
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5

    causal = True
    after_layers = ("final_norm", "projection")
    pooled_as = "projection_dim"

    layout = TEXT._replace(
        fields={**TEXT.fields, "projection_dim": "projection_dim", "eos_token_id": "eos_token_id"},
        weights=(*TEXT.weights, ("projection", "text_projection", PRODUCT)),
    )

    def finish(self, hidden: jax.Array, inputs: jax.Array, mask: Any) -> EncoderOutput:
        """Returns the hidden states, and `pooled` of the token that ends each text."""
        del mask
        hidden = layer_norm(self.norm_epsilon, self.dtype, "final_norm")(hidden)
        legacy = self.eos_token_id == _LEGACY_EOS
        end = jnp.argmax(inputs if legacy else inputs == self.eos_token_id, axis=1)
        pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
        return EncoderOutput(hidden, _project(pooled, self.projection_dim))


def _project(pooled, dim):
    projection = dense(dim, jnp.float32, "projection", use_bias=False)
    return projection(pooled.astype(jnp.float32))

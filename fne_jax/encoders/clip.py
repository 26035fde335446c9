"""CLIP (Radford et al. 2021, arXiv 2103.00020), as in Hugging Face's CLIPModel."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from fne_jax.encoders.transformer import EncoderOutput, TextTower, dense, layer_norm
from fne_jax.encoders.vision_transformer import VisionTower

# The end token's id that configs of OpenAI's checkpoints name, though their tokenizer's is 49407.
_LEGACY_EOS = 2


class ClipVision(VisionTower, kw_only=True):
    """A ViT with a LayerNorm before the layers, read at its class token.

    Attributes:
      projection_dim: Dimension of the space shared with the text tower.
    """

    projection_dim: int
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5

    @property
    def pooled_dim(self) -> int:
        """The dimension of `pooled`."""
        return self.projection_dim

    @nn.compact
    def __call__(self, pixels: jax.Array, *, deterministic: bool = True) -> EncoderOutput:
        """Encodes [batch, height, width, 3] normalised pixels; token 0 is the class token.

        `last_hidden_state` is taken before the last LayerNorm, which is applied to the class token
        alone, for `pooled`.

        Raises:
          ValueError: if the pixels are not `image_size` square.
        """
        hidden = self.embed_patches(pixels, class_token=True, patch_bias=False)
        hidden = layer_norm(self.norm_epsilon, self.dtype, "embedding_norm")(hidden)
        hidden = self.run_layers(hidden, None, deterministic, pre_norm=True)
        pooled = layer_norm(self.norm_epsilon, jnp.float32, "final_norm")(hidden[:, 0])
        return EncoderOutput(hidden, _project(pooled, self.projection_dim))


class ClipText(TextTower, kw_only=True):
    """A causal transformer, read at the token that ends the text.

    Attributes:
      projection_dim: Dimension of the space shared with the image tower.
      eos_token_id: Id of the token that ends a text; 2, which OpenAI's checkpoints state, stands
        for the highest id in a text.
    """

    projection_dim: int
    eos_token_id: int
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5

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
        """Encodes [batch, tokens] token ids; the mask, of the same shape, is 0 at padding.

        Raises:
          ValueError: if the sequence is longer than `max_length`.
        """
        mask = None if attention_mask is None else attention_mask.astype(bool)
        hidden = self.embed_tokens(input_ids).astype(self.dtype)
        hidden = self.run_layers(hidden, mask, deterministic, pre_norm=True, causal=True)
        hidden = layer_norm(self.norm_epsilon, self.dtype, "final_norm")(hidden)
        legacy = self.eos_token_id == _LEGACY_EOS
        end = jnp.argmax(input_ids if legacy else input_ids == self.eos_token_id, axis=1)
        pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
        return EncoderOutput(hidden, _project(pooled, self.projection_dim))


def _project(pooled, dim):
    projection = dense(dim, jnp.float32, "projection", use_bias=False)
    return projection(pooled.astype(jnp.float32))

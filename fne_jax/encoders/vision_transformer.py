"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), as in Hugging Face's ViTModel."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fne_jax.encoders.layers import dense, layer_norm
from fne_jax.encoders.layouts import DENSE, IMAGE_SIZES, NORM, PATCHES, VALUE, Layout
from fne_jax.encoders.transformer import EncoderOutput, Tower


class VisionTower(Tower):
    """What the image encoders share.

    Attributes:
      image_size: Pixels along a side; what fills no patch, at the right and below, is not seen.
      patch_size: Pixels along a patch's side.
    """

    image_size: int
    patch_size: int

    # Whether position embeddings are interpolated for another image size with antialiasing.
    antialias: ClassVar[bool] = False

    def embed_patches(
        self,
        pixels: jax.Array,
        *,
        class_token: bool,
        patch_bias: bool = True,
        positions: bool = True,
    ) -> jax.Array:
        """Returns the [batch, tokens, width] sum of the embeddings of patches and positions.

        They are in the compute dtype, patches in reading order.

        Args:
          pixels: [batch, image_size, image_size, 3] normalised pixels; else there is a ValueError.
          class_token: whether a learned token comes first.
          patch_bias: whether a bias is added to the patches' embeddings.
          positions: whether learned embeddings of the positions are added.
        """
        if pixels.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"pixels: expected [batch, {self.image_size}, {self.image_size}, 3], "
                f"got {pixels.shape}"
            )
        # A product over flattened patches: the gradient of the equal strided convolution is an
        # order of magnitude slower on a CPU.
        embed = dense(self.width, self.dtype, "patch_embedding", use_bias=patch_bias)
        hidden = embed(flatten_patches(pixels.astype(self.dtype), self.patch_size))
        if class_token:
            first = self._learned_tokens("class_token", 1, pixels.shape[0])
            hidden = jnp.concatenate([first, hidden], axis=1)
        if positions:
            hidden += self._learned_tokens("position_embedding", hidden.shape[1])
        return hidden

    def insert_registers(self, hidden: jax.Array, count: int) -> jax.Array:
        """Returns [batch, tokens, width] hidden states with learned ones after the first token.

        Darcet et al. 2023, arXiv 2309.16588.
        """
        registers = self._learned_tokens("register_tokens", count, hidden.shape[0])
        return jnp.concatenate([hidden[:, :1], registers, hidden[:, 1:]], axis=1)

    def _learned_tokens(self, name: str, count: int, batch: int = 1) -> jax.Array:
        """Returns [batch, count, width] parameters in the compute dtype, alike for all images."""
        init = nn.initializers.normal(self.width**-0.5, jnp.float32)
        tokens = self.param(name, init, (1, count, self.width))
        return jnp.broadcast_to(tokens.astype(self.dtype), (batch, count, self.width))


class VisionTransformer(VisionTower):
    """Patches, a class token, learned positions, pre-norm layers and a last LayerNorm."""

    layout = Layout(
        fields=IMAGE_SIZES,
        fixed={"num_channels": 3, "qkv_bias": True},
        weights=(
            ("class_token", "embeddings.cls_token", VALUE),
            ("position_embedding", "embeddings.position_embeddings", VALUE),
            ("patch_embedding", "embeddings.patch_embeddings.projection", PATCHES),
            ("final_norm", "layernorm", NORM),
        ),
        layer="encoder.layer.{}.",
        layer_weights=(
            ("attention_norm", "layernorm_before", NORM),
            ("attention/query", "attention.attention.query", DENSE),
            ("attention/key", "attention.attention.key", DENSE),
            ("attention/value", "attention.attention.value", DENSE),
            ("attention/output", "attention.output.dense", DENSE),
            ("mlp_norm", "layernorm_after", NORM),
            ("mlp_in", "intermediate.dense", DENSE),
            ("mlp_out", "output.dense", DENSE),
        ),
    )

    def embed(self, inputs: jax.Array) -> jax.Array:
        """Returns the [batch, tokens, width] embeddings of pixels; token 0 is the class token."""
        return self.embed_patches(inputs, class_token=True)

    def finish(self, hidden: jax.Array, inputs: Any, mask: Any) -> EncoderOutput:
        """Returns the hidden states after the last LayerNorm."""
        del inputs, mask
        return EncoderOutput(layer_norm(self.norm_epsilon, self.dtype, "final_norm")(hidden))


def flatten_patches(pixels: jax.Array, patch_size: int) -> jax.Array:
    """Returns the [batch, patches, patch_size * patch_size * 3] pixels of patches in reading order.

    The pixels of images are [batch, height, width, 3], and `patch_size` is one side of a patch.
    """
    batch, height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    covered = pixels[:, : rows * patch_size, : columns * patch_size]
    patches = covered.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return patches.swapaxes(2, 3).reshape(batch, rows * columns, -1)

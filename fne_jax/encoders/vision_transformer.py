"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), as in Hugging Face's ViTModel."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from fne_jax.encoders.transformer import KERNEL_INIT, TransformerStack, layer_norm


@flax.struct.dataclass
class EncoderOutput:
    """What an encoder gives: `last_hidden_state`, [batch, tokens, width] in the compute dtype."""

    last_hidden_state: jax.Array


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, pre-norm layers and a last LayerNorm.

    Attributes:
      image_size: pixels of a side, a multiple of `patch_size`.
      patch_size: pixels of a patch's side.
      width: dimension of a token.
      layers: number of transformer layers.
      heads: number of attention heads.
      mlp_width: width of the MLPs.
      norm_epsilon: of the LayerNorms; 1e-12 in Google's checkpoints.
      dropout: rate after the embeddings and in the layers.
      dtype: compute dtype; parameters stay float32.
      scan_layers: see `TransformerStack`.
      remat: see `TransformerStack`.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    norm_epsilon: float = 1e-12
    dropout: float = 0.0
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array, *, deterministic: bool = True) -> EncoderOutput:
        """Encodes [batch, height, width, 3] normalised pixels; token 0 is the class token.

        Raises:
          ValueError: if the pixels are not `image_size` square.
        """
        if pixels.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"pixels: expected [batch, {self.image_size}, {self.image_size}, 3], "
                f"got {pixels.shape}"
            )
        token_init = nn.initializers.normal(self.width**-0.5)
        # A product over flattened patches: the gradient of the equal strided convolution is an
        # order of magnitude slower on a CPU.
        patches = nn.Dense(
            self.width, dtype=self.dtype, kernel_init=KERNEL_INIT, name="patch_embedding"
        )(flatten_patches(pixels.astype(self.dtype), self.patch_size))
        class_token = self.param("class_token", token_init, (1, 1, self.width))
        positions = self.param(
            "position_embedding", token_init, (1, patches.shape[1] + 1, self.width)
        )
        class_token = jnp.broadcast_to(
            class_token.astype(self.dtype), (pixels.shape[0], 1, self.width)
        )
        hidden = jnp.concatenate([class_token, patches], axis=1) + positions.astype(self.dtype)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=deterministic)
        hidden = TransformerStack(
            layers=self.layers,
            heads=self.heads,
            mlp_width=self.mlp_width,
            pre_norm=True,
            norm_epsilon=self.norm_epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="encoder",
        )(hidden, None, deterministic)
        return EncoderOutput(layer_norm(self.norm_epsilon, self.dtype, "final_norm")(hidden))


def flatten_patches(pixels: jax.Array, patch_size: int) -> jax.Array:
    """[batch, height, width, 3] -> [batch, patches, patch_size * patch_size * 3], rows first."""
    batch, height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixels.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return patches.swapaxes(2, 3).reshape(batch, rows * columns, -1)

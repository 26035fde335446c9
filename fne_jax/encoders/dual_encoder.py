"""Two towers into one space: pooling, optional projection, L2 normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from fne_jax.encoders.attention import check_name
from fne_jax.encoders.bert import Bert
from fne_jax.encoders.transformer import KERNEL_INIT, EncoderOutput
from fne_jax.encoders.vision_transformer import VisionTransformer
from fne_jax.errors import UserError

# Floor of the norm that an embedding is divided by, as in PyTorch's `normalize`.
_MIN_NORM = 1e-12


def pool_mean(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the [batch, dim] mean of the real tokens of [batch, tokens, dim] and their mask."""
    weights = mask.astype(jnp.float32)[..., None]
    total = (hidden.astype(jnp.float32) * weights).sum(axis=1)
    return total / jnp.maximum(weights.sum(axis=1), 1.0)


def pool_mean_with_padding(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean of all tokens, padding included, as the authors' text tower does."""
    del mask
    return hidden.astype(jnp.float32).mean(axis=1)


def pool_first(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the first token, the class token of ViT and BERT."""
    del mask
    return hidden[:, 0].astype(jnp.float32)


POOLINGS = {
    "mean": pool_mean,
    "mean_with_padding": pool_mean_with_padding,
    "first": pool_first,
}
# The pooling that takes a tower's own `EncoderOutput.pooled`.
CHECKPOINT = "checkpoint"


class DualEncoder(nn.Module):
    """An image tower and a text tower that embed into the same unit sphere.

    Attributes:
      image: the image tower.
      text: the text tower.
      image_pooling: a key of `POOLINGS`, or "checkpoint" for the embedding that the tower itself
        gives (CLIP and SigLIP).
      text_pooling: as `image_pooling`.
      projection_dim: dimension of a learned bias-free projection after pooling; 0 for none.
    """

    image: nn.Module
    text: nn.Module
    image_pooling: str = "mean"
    text_pooling: str = "mean"
    projection_dim: int = 0

    def setup(self):
        """Creates the projections, if any."""
        if self.projection_dim:
            self.image_projection, self.text_projection = (
                nn.Dense(self.projection_dim, use_bias=False, kernel_init=KERNEL_INIT)
                for _ in range(2)
            )

    def __call__(self, pixels, input_ids, attention_mask, *, deterministic=True):
        """Returns the [batch, dim] embeddings of images and of captions."""
        return (
            self.encode_image(pixels, deterministic=deterministic),
            self.encode_text(input_ids, attention_mask, deterministic=deterministic),
        )

    def encode_image(self, pixels: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """[batch, height, width, 3] normalised pixels -> [batch, dim] unit vectors, float32.

        Raises:
          UserError: if the pooling is "checkpoint" and the tower has no embedding of its own.
        """
        out = self.image(pixels, deterministic=deterministic)
        pooled = _pool(out, jnp.ones(out.last_hidden_state.shape[:2], bool), self.image_pooling)
        return unit(self.image_projection(pooled) if self.projection_dim else pooled)

    def encode_text(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        """[batch, tokens] ids and mask -> [batch, dim] unit vectors, float32.

        Raises:
          UserError: if the pooling is "checkpoint" and the tower has no embedding of its own.
        """
        out = self.text(input_ids, attention_mask, deterministic=deterministic)
        pooled = _pool(out, attention_mask, self.text_pooling)
        return unit(self.text_projection(pooled) if self.projection_dim else pooled)


def _pool(out: EncoderOutput, mask: jax.Array, pooling: str) -> jax.Array:
    if pooling != CHECKPOINT:
        return POOLINGS[pooling](out.last_hidden_state, mask)
    if out.pooled is None:
        raise UserError(
            f"pooling is {CHECKPOINT!r}, but this tower has no embedding of its own; "
            f"expected one of {', '.join(POOLINGS)}"
        )
    return out.pooled


def unit(vectors: jax.Array) -> jax.Array:
    """Returns the rows of [n, dim] divided by their L2 norm, in float32."""
    vectors = vectors.astype(jnp.float32)
    squared = jnp.square(vectors).sum(axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, _MIN_NORM**2))


def build_dual_encoder(encoder: ml_collections.ConfigDict, vocab_size: int) -> DualEncoder:
    """Returns the model that the `encoder` part of a config describes.

    Args:
      encoder: `config.encoder`, see configs/base.py.
      vocab_size: number of the tokenizer's ids.

    Raises:
      UserError: naming the field, if the sizes do not fit together or a name is unknown.
    """
    image, text = encoder.image, encoder.text
    for tower in ("image", "text"):
        settings = encoder[tower]
        if settings.width % settings.heads:
            raise UserError(
                f"config.encoder.{tower}.width is {settings.width}, "
                f"which {settings.heads} heads do not divide"
            )
        if settings.pooling not in POOLINGS:
            raise UserError(
                f"config.encoder.{tower}.pooling is {settings.pooling!r}; "
                f"expected one of {', '.join(POOLINGS)}"
            )
    if image.image_size % image.patch_size:
        raise UserError(
            f"config.encoder.image.image_size is {image.image_size}, "
            f"not a multiple of patch_size {image.patch_size}"
        )
    if image.width != text.width and not encoder.projection_dim:
        raise UserError(
            f"the towers' widths differ ({image.width} and {text.width}); make them equal or set "
            "config.encoder.projection_dim"
        )
    if encoder.compute_dtype not in ("float32", "bfloat16"):
        raise UserError(
            f"config.encoder.compute_dtype is {encoder.compute_dtype!r}; "
            "expected float32 or bfloat16"
        )
    check_name(encoder.attention, "config.encoder.attention")
    shared = {
        "dtype": jnp.dtype(encoder.compute_dtype),
        "attention": encoder.attention,
        "scan_layers": encoder.scan_layers,
        "remat": encoder.remat,
    }
    return DualEncoder(
        image=VisionTransformer(
            image_size=image.image_size,
            patch_size=image.patch_size,
            width=image.width,
            layers=image.layers,
            heads=image.heads,
            mlp_width=image.mlp_width,
            dropout=image.dropout,
            **shared,
        ),
        text=Bert(
            vocab_size=vocab_size,
            max_length=text.max_length,
            width=text.width,
            layers=text.layers,
            heads=text.heads,
            mlp_width=text.mlp_width,
            dropout=text.dropout,
            **shared,
        ),
        image_pooling=image.pooling,
        text_pooling=text.pooling,
        projection_dim=encoder.projection_dim,
    )

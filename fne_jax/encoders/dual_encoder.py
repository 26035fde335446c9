"""An image tower and a text tower into one space: pooling, projection, L2 normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from fne_jax.encoders.layers import dense, layer_norm
from fne_jax.encoders.transformer import ALL

# Floor of the norm that an embedding is divided by, as in PyTorch's `normalize`.
_MIN_NORM = 1e-12


def pool_mean(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the [batch, dim] float32 mean of the tokens that are not padding.

    Hidden states are [batch, tokens, dim], and the mask [batch, tokens] is 0 at padding.
    """
    weights = mask.astype(jnp.float32)[..., None]
    total = (hidden.astype(jnp.float32) * weights).sum(axis=1)
    return total / jnp.maximum(weights.sum(axis=1), 1.0)


def pool_mean_to_longest(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean of as many tokens as the batch's longest text has.

    This is what "mean_with_padding" gives where batches are padded to their longest text, as
    in the authors' training, without a length that changes from batch to batch.
    """
    longest = mask.sum(axis=1).max()
    # Inside a `shard_map` over rows, the batch's other rows lie on other devices.
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if axes:
        longest = jax.lax.pmax(longest, axes)
    counted = jnp.arange(mask.shape[1])[None, :] < longest
    return pool_mean(hidden, jnp.broadcast_to(counted, mask.shape))


def pool_first_and_mean(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the first token beside the mean of the others, as DINOv2 is read by linear layers.

    They are [batch, 2 * dim] float32; the arguments are as of `pool_mean`.
    """
    return jnp.concatenate(
        [hidden[:, 0].astype(jnp.float32), pool_mean(hidden[:, 1:], mask[:, 1:])], -1
    )


# The pooling of a text that depends on the other texts of its batch.
LONGEST_POOLING = "mean_to_longest"
# The pooling that is twice as wide as a token.
FIRST_AND_MEAN = "first_and_mean"
POOLINGS = {
    "mean": pool_mean,
    # Of all tokens, padding included, as the authors' text tower does.
    "mean_with_padding": lambda hidden, _: hidden.astype(jnp.float32).mean(axis=1),
    LONGEST_POOLING: pool_mean_to_longest,
    # That of the class token in ViT and BERT.
    "first": lambda hidden, _: hidden[:, 0].astype(jnp.float32),
    # Padding has the number that sentence-transformers puts in its place.
    "max": lambda hidden, mask: jnp.where(
        mask[..., None] > 0, hidden.astype(jnp.float32), -1e9
    ).max(axis=1),
    FIRST_AND_MEAN: pool_first_and_mean,
}
# The poolings that do not look at the hidden states of padding.
IGNORING_PADDING = ("mean", "first", "max", FIRST_AND_MEAN)
# The pooling that takes a tower's own `EncoderOutput.pooled`.
CHECKPOINT = "checkpoint"


class DualEncoder(nn.Module):
    """An image tower and a text tower that embed into the same unit sphere.

    Attributes:
      image: The image tower.
      text: The text tower.
      image_pooling: A key of `POOLINGS`, or "checkpoint" for the embedding that the tower itself
        gives (CLIP and SigLIP).
      text_pooling: A key of `POOLINGS`, or "checkpoint" for the tower's own embedding.
      projection_dim: Dimension of a learned projection after pooling; 0 for none.
      projection_hidden: Width of the hidden layer of the projections; 0 for bias-free matrices.
    """

    image: nn.Module
    text: nn.Module
    image_pooling: str = "mean"
    text_pooling: str = "mean"
    projection_dim: int = 0
    projection_hidden: int = 0

    def setup(self):
        """Creates the projections, if any."""
        if self.projection_dim:
            self.image_projection, self.text_projection = (
                Projection(self.projection_dim, self.projection_hidden)
                if self.projection_hidden
                else dense(self.projection_dim, jnp.float32, use_bias=False)
                for _ in range(2)
            )

    def __call__(
        self,
        pixels: jax.Array | None,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        *,
        deterministic: bool = True,
        image_features: jax.Array | None = None,
        text_features: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the [batch, dim] unit embeddings of images and of captions, float32.

        Args:
          pixels: [batch, height, width, 3] normalised pixels; None with `image_features`.
          input_ids: [batch, tokens] int32 token ids.
          attention_mask: [batch, tokens] int32, 0 at padding.
          deterministic: whether dropout is off.
          image_features: What `frozen_image` returned of the pixels; `frozen_text` of the tokens.
        """
        return (
            self.encode_image(pixels, deterministic=deterministic, features=image_features),
            self.encode_text(
                input_ids, attention_mask, deterministic=deterministic, features=text_features
            ),
        )

    def encode_image(
        self,
        pixels: jax.Array | None,
        *,
        deterministic: bool = True,
        features: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the embeddings of images alone, see `__call__`."""
        return self._encode("image", pixels, None, deterministic, features)

    def encode_text(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        *,
        deterministic: bool = True,
        features: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the embeddings of captions alone, see `__call__`."""
        return self._encode("text", input_ids, attention_mask, deterministic, features)

    def _encode(self, name, inputs, mask, deterministic, features):
        if features is None or getattr(self, name).frozen_layers != ALL:
            features = self._pooled(
                name, inputs, mask, deterministic=deterministic, hidden=features
            )
        if self.projection_dim:
            features = getattr(self, f"{name}_projection")(features)
        return unit(features)

    def frozen_image(self, pixels: jax.Array) -> jax.Array:
        """Returns what the frozen part of the image tower makes of pixels.

        That is [batch, tokens, width] hidden states in the compute dtype; of a tower that is frozen
        as a whole, its [batch, width] float32 pooled output.
        """
        return self._frozen("image", pixels, None)

    def frozen_text(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Returns what the frozen part of the text tower makes of tokens; see `frozen_image`."""
        return self._frozen("text", input_ids, attention_mask)

    def _frozen(self, name, inputs, mask):
        tower = getattr(self, name)
        if tower.frozen_layers == ALL:
            return self._pooled(name, inputs, mask)
        return tower(inputs, mask, lower=True)

    def _pooled(self, name, inputs, mask, **options):
        """Returns the [batch, width] float32 pooled output of a tower."""
        out = getattr(self, name)(inputs, mask, **options)
        pooling = getattr(self, f"{name}_pooling")
        if pooling == CHECKPOINT:
            return out.pooled
        if mask is None:
            mask = jnp.ones(out.last_hidden_state.shape[:2], bool)
        return POOLINGS[pooling](out.last_hidden_state, mask)


class Projection(nn.Module):
    """A LayerNorm, a hidden layer and a bias-free matrix to `dim`, for towers that are frozen."""

    dim: int
    hidden: int

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """Returns the [batch, dim] float32 projection of [batch, width] pooled outputs."""
        # The epsilon of ViT's and BERT's.
        normed = layer_norm(1e-12, jnp.float32, "norm")(pooled)
        hidden = jax.nn.gelu(dense(self.hidden, jnp.float32, "hidden")(normed))
        return dense(self.dim, jnp.float32, "output", use_bias=False)(hidden)


def unit(vectors: jax.Array) -> jax.Array:
    """Returns the rows of [n, dim] divided by their L2 norm, in float32."""
    vectors = vectors.astype(jnp.float32)
    squared = jnp.square(vectors).sum(axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, _MIN_NORM**2))

"""A batch through the two towers: all of them, or their frozen parts alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# The keys of a batch that each tower reads, and the key of what its frozen part makes of them.
READ = {"image": ("image",), "text": ("input_ids", "attention_mask")}
FEATURES = {"image": "image_features", "text": "text_features"}
PixelStatistics = tuple[tuple[float, ...], tuple[float, ...]]


def normalize_pixels(
    image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """Returns [batch, side, side, 3] uint8 pixels normalised by channel, as float32.

    `mean` and `std` are those of each channel, with pixels in [0, 1].
    """
    mean, std = (jnp.array(values, jnp.float32).reshape(1, 1, 1, 3) for values in (mean, std))
    return (image.astype(jnp.float32) / 255.0 - mean) / std


def embed(
    apply_fn: Callable,
    params: Any,
    inputs: Mapping[str, jax.Array],
    pixel_statistics: PixelStatistics,
    dropout_rng: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the [batch, dim] embeddings of images and of captions.

    Args:
      apply_fn: The `apply` of the two towers.
      params: The parameters that are used: without those of the frozen parts for which `inputs`
        holds the features.
      inputs: `image` [batch, side, side, 3] uint8 or `image_features`; `input_ids` and
        `attention_mask` [batch, length] int32, and maybe `text_features`.
      pixel_statistics: The mean and the standard deviation of each channel, in [0, 1].
      dropout_rng: A key; None for no dropout.
    """
    return apply_fn(
        {"params": params},
        *_arguments("image", inputs, pixel_statistics),
        *_arguments("text", inputs, pixel_statistics),
        deterministic=dropout_rng is None,
        rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        **{name: inputs[name] for name in FEATURES.values() if name in inputs},
    )


def embed_one(
    apply_fn: Callable,
    params: Any,
    inputs: Mapping[str, jax.Array],
    pixel_statistics: PixelStatistics,
    tower: str,
) -> jax.Array:
    """Returns the [batch, dim] embeddings of one tower, "image" or "text"; see `embed`."""
    features = FEATURES[tower]
    return apply_fn(
        {"params": params},
        *_arguments(tower, inputs, pixel_statistics),
        method=f"encode_{tower}",
        **({"features": inputs[features]} if features in inputs else {}),
    )


def frozen_features(
    apply_fn: Callable,
    params: Any,
    inputs: Mapping[str, jax.Array],
    pixel_statistics: PixelStatistics,
) -> jax.Array:
    """Returns what the frozen part of a tower makes of its inputs, as `DualEncoder.frozen_image`.

    It takes what `embed` does: of `params` those of the frozen parts, and of `inputs` the keys that
    one tower reads, and no others.
    """
    tower = "image" if "image" in inputs else "text"
    arguments = _arguments(tower, inputs, pixel_statistics)
    return apply_fn({"params": params}, *arguments, method=f"frozen_{tower}")


def _arguments(tower, inputs, pixel_statistics):
    """Returns what a tower takes of a batch; None for images that are there as features alone."""
    if tower == "text":
        return inputs["input_ids"], inputs["attention_mask"]
    image = inputs.get("image")
    return (None if image is None else normalize_pixels(image, *pixel_statistics),)

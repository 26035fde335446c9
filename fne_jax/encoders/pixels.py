"""Pixels as the image tower takes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def normalize_pixels(
    image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """Returns pixels normalised by channel.

    Args:
      image: [batch, side, side, 3] uint8.
      mean: The mean of each channel, with pixels in [0, 1].
      std: The standard deviation of each channel, with pixels in [0, 1].

    Returns:
      [batch, side, side, 3] float32.
    """
    mean, std = (jnp.array(values).reshape(1, 1, 1, 3) for values in (mean, std))
    return (image.astype(jnp.float32) / 255.0 - mean) / std

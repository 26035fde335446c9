"""Training augmentation in JAX, from uint8 pictures, for hosts with few cores.

Carries out what `training_rows.DeviceRows` drew: the operations of `image_preprocessing` and
`randaugment`, rounded to uint8 after each. The resize is PIL's, from which the host's differs by a
fraction of a level.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fne_jax.data.images.augmentation import FILL, OPERATIONS

# From here on an operation moves pixels, and is one warp with its own matrix.
_FIRST_WARP = OPERATIONS.index("shear_x")


def augment_batch(batch: dict[str, jax.Array], *, size: int) -> jax.Array:
    """Returns [batch, size, size, 3] uint8 pictures, cropped, mirrored and operated on as drawn.

    Args:
      batch: the arrays of `training_rows.DeviceRows` with a batch axis before their own.
      size: pixels of a side of the result.
    """

    def augment(image, crop, mirrored, operations, arguments):
        image = crop_and_resize(image, crop, size)
        image = jnp.where(mirrored, image[:, ::-1], image)
        # A loop, so that the operations are compiled once.
        return jax.lax.scan(
            lambda image, drawn: (apply_operation(image, *drawn), None),
            image,
            (operations, arguments),
        )[0]

    names = ("image", "crop", "mirrored", "operations", "arguments")
    return jax.vmap(augment)(*(batch[name] for name in names))


def crop_and_resize(image: jax.Array, crop: jax.Array, size: int) -> jax.Array:
    """Returns a window of an image at [size, size, 3] uint8, antialiased bicubic as PIL's.

    Nothing outside of the window is seen.

    Args:
      image: [height, width, 3] uint8.
      crop: [4] float32, top, left, height and width in pixels.
      size: pixels of a side of the result.
    """
    rows = _resize_weights(crop[0], crop[2], image.shape[0], size)
    columns = _resize_weights(crop[1], crop[3], image.shape[1], size)
    # Exact products: levels up to 255 are to come out within half a level.
    pixels = jnp.einsum(
        "ih,hwc,jw->ijc", rows, image.astype(jnp.float32), columns, precision="highest"
    )
    return _levels(jnp.round(pixels))


def apply_operation(image: jax.Array, operation: jax.Array, argument: jax.Array) -> jax.Array:
    """Returns [height, width, 3] uint8 after one of RandAugment's operations.

    Args:
      image: [height, width, 3] uint8.
      operation: [] int32, an index into `augmentation.OPERATIONS`.
      argument: [] float32; not read where the operation takes none.
    """
    height, width, _ = image.shape
    # Of the ways to move pixels one is chosen before anything is moved: under `vmap` every branch
    # of a switch is computed.
    matrix = _inverse_matrices(argument, height, width)[jnp.maximum(operation - _FIRST_WARP, 0)]
    functions = (
        lambda: image,
        lambda: autocontrast(image),
        lambda: equalize(image),
        lambda: brightness(image, argument),
        lambda: sharpness(image, argument),
        lambda: warp(image, matrix),
    )
    return jax.lax.switch(jnp.minimum(operation, _FIRST_WARP), functions)


def autocontrast(image: jax.Array) -> jax.Array:
    """Stretches each channel of [height, width, 3] uint8 to the whole range."""
    levels = image.astype(jnp.int32)
    low, high = (bound(levels, axis=(0, 1), keepdims=True) for bound in (jnp.min, jnp.max))
    stretched = (levels - low) * 255 // jnp.maximum(high - low, 1)
    return _levels(jnp.where(high > low, stretched, levels))


def equalize(image: jax.Array) -> jax.Array:
    """Evens out the histogram of each channel of [height, width, 3] uint8."""

    def equalized(channel):
        counts = jnp.bincount(channel.ravel(), length=256)
        brightest = counts[channel.max()]
        step = (channel.size - brightest) // 255
        table = (step // 2 + jnp.cumsum(counts) - counts) // jnp.maximum(step, 1)
        return jnp.where(step == 0, channel, _levels(table)[channel])

    return jax.vmap(equalized, in_axes=2, out_axes=2)(image)


def brightness(image: jax.Array, argument: jax.Array) -> jax.Array:
    """Multiplies every level of [height, width, 3] uint8."""
    return _levels(image.astype(jnp.float32) * argument)


def sharpness(image: jax.Array, argument: jax.Array) -> jax.Array:
    """Moves [height, width, 3] uint8 away from a smoothed copy; the outermost pixels stay."""
    height, width, _ = image.shape
    levels = image.astype(jnp.int32)
    around = sum(
        levels[top : top + height - 2, left : left + width - 2]
        for top in range(3)
        for left in range(3)
    )
    centre = levels[1:-1, 1:-1]
    smooth = (around + 4 * centre + 6) // 13
    sharp = _levels(smooth + argument * (centre - smooth).astype(jnp.float32))
    return image.at[1:-1, 1:-1].set(sharp)


def warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns [height, width, 3] uint8 whose pixel at (x, y) is the image's at matrix @ (x, y, 1).

    Args:
      image: [height, width, 3] uint8.
      matrix: [2, 3] float32. Bilinear between pixels; outside lies the fill.
    """
    height, width, _ = image.shape
    x, y = jnp.meshgrid(jnp.arange(width), jnp.arange(height))
    position = jnp.stack([x, y, jnp.ones_like(x)]).astype(jnp.float32)
    # Exact products: a coordinate of 384 needs more bits than an accelerator's default keeps.
    from_x, from_y = jnp.tensordot(matrix, position, axes=1, precision="highest")
    left, top = jnp.floor(from_x), jnp.floor(from_y)
    right_share, bottom_share = (from_x - left)[..., None], (from_y - top)[..., None]
    left, top = left.astype(jnp.int32), top.astype(jnp.int32)

    def at(row, column):
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        index = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
        return jnp.where(inside[..., None], image.reshape(-1, 3)[index], FILL).astype(jnp.float32)

    upper = at(top, left) * (1 - right_share) + at(top, left + 1) * right_share
    lower = at(top + 1, left) * (1 - right_share) + at(top + 1, left + 1) * right_share
    return _levels(jnp.round(upper * (1 - bottom_share) + lower * bottom_share))


def _resize_weights(start, length, pixels, size):
    """Returns [size, pixels] float32, the weights of Keys' cubic kernel (a = -0.5) in a window."""
    scale = length / size
    centre = start + (jnp.arange(size, dtype=jnp.float32) + 0.5) * scale
    pixel = jnp.arange(pixels, dtype=jnp.float32) + 0.5
    distance = jnp.abs(pixel[None, :] - centre[:, None]) / jnp.maximum(scale, 1.0)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0.0))
    inside = (pixel > start) & (pixel < start + length)
    weights = jnp.where(inside[None, :], weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _inverse_matrices(argument, height, width):
    """Returns [5, 2, 3]: for each operation that moves pixels, where its pixels come from."""
    one, zero = jnp.ones_like(argument), jnp.zeros_like(argument)
    angle = jnp.deg2rad(argument)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    rows = {
        "shear_x": [[one, -argument, zero], [zero, one, zero]],
        "shear_y": [[one, zero, zero], [-argument, one, zero]],
        "translate_x": [[one, zero, argument], [zero, one, zero]],
        "translate_y": [[one, zero, zero], [zero, one, argument]],
        "rotate": [
            [cos, -sin, x - cos * x + sin * y],
            [sin, cos, y - sin * x - cos * y],
        ],
    }
    return jnp.array([rows[name] for name in OPERATIONS[_FIRST_WARP:]])


def _levels(values):
    return jnp.clip(values, 0, 255).astype(jnp.uint8)

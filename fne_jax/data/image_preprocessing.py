"""From JPEG bytes to uint8 pixels with tf.image; normalisation happens on the device."""

from __future__ import annotations

import math
import pathlib

import numpy as np
import tensorflow as tf

from fne_jax.errors import UserError

# The fractions of the area and the aspect ratios that a training crop may have (the paper's).
CROP_AREA = (0.5, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# As PIL decodes; TensorFlow's default is faster and up to some levels off.
_DCT = "INTEGER_ACCURATE"


def evaluation_image(jpeg: tf.Tensor, size: int) -> tf.Tensor:
    """Returns the whole picture at [size, size, 3] uint8, resized bicubically without a crop."""
    return _resize(tf.io.decode_jpeg(jpeg, channels=3, dct_method=_DCT), size)


def resized_pixels(image: np.ndarray, size: int) -> np.ndarray:
    """Returns [height, width, 3] uint8 pixels as `evaluation_image` resizes a picture."""
    return _resize(tf.constant(image), size).numpy()


def read_picture(path: pathlib.Path, size: int) -> np.ndarray:
    """Returns a JPEG or PNG file as `evaluation_image` gives it, [size, size, 3] uint8.

    Raises:
      UserError: if the file cannot be read or decoded.
    """
    try:
        content = path.read_bytes()
        if tf.io.is_jpeg(content):
            return evaluation_image(tf.constant(content), size).numpy()
        return resized_pixels(tf.io.decode_png(content, channels=3).numpy(), size)
    except (OSError, tf.errors.InvalidArgumentError) as error:
        raise UserError(
            f"{path}: cannot be read as a JPEG or PNG: {str(error).splitlines()[0]}"
        ) from error


def cropped_and_flipped_image(jpeg: tf.Tensor, size: int, seed: tf.Tensor) -> tf.Tensor:
    """Returns a random crop of a picture, mirrored half of the time, [size, size, 3] uint8.

    Args:
      jpeg: [] string.
      size: pixels of a side of the result.
      seed: [2] int32; the result is a function of it.
    """
    seeds = tf.random.split(seed, 2)
    window = random_crop_window(tf.io.extract_jpeg_shape(jpeg), seeds[0])
    # Decoding the window alone is cheaper than decoding the picture and cropping it.
    image = _resize(tf.image.decode_and_crop_jpeg(jpeg, window, channels=3, dct_method=_DCT), size)
    flip = tf.random.stateless_uniform([], seeds[1]) < 0.5
    return tf.cond(flip, lambda: tf.image.flip_left_right(image), lambda: image)


def random_crop_window(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Returns [top, left, height, width] of a random crop, as torchvision's RandomResizedCrop.

    The first of ten draws of area and log-uniform aspect that fits; if none does, the largest
    central window whose aspect is allowed.

    Args:
      shape: [3] int32, height, width and channels of the picture.
      seed: [2] int32.
    """
    height, width = tf.cast(shape[0], tf.float32), tf.cast(shape[1], tf.float32)
    draws = tf.random.stateless_uniform([4, CROP_ATTEMPTS], seed)
    area = height * width * (CROP_AREA[0] + draws[0] * (CROP_AREA[1] - CROP_AREA[0]))
    low, high = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    aspect = tf.exp(low + draws[1] * (high - low))
    crop_width = tf.round(tf.sqrt(area * aspect))
    crop_height = tf.round(tf.sqrt(area / aspect))
    fits = (crop_width >= 1) & (crop_width <= width) & (crop_height >= 1) & (crop_height <= height)
    first = tf.argmax(tf.cast(fits, tf.int32))
    chosen_height, chosen_width = crop_height[first], crop_width[first]
    top = tf.floor(draws[2][first] * (height - chosen_height + 1))
    left = tf.floor(draws[3][first] * (width - chosen_width + 1))

    central_height = tf.minimum(height, tf.round(width / CROP_ASPECT[0]))
    central_width = tf.minimum(width, tf.round(height * CROP_ASPECT[1]))
    drawn = tf.stack([top, left, chosen_height, chosen_width])
    central = tf.stack(
        [
            tf.floor((height - central_height) / 2),
            tf.floor((width - central_width) / 2),
            central_height,
            central_width,
        ]
    )
    return tf.cast(tf.where(tf.reduce_any(fits), drawn, central), tf.int32)


def plain_image(jpeg: tf.Tensor, size: int, seed: tf.Tensor) -> tf.Tensor:
    """Returns `evaluation_image`; training without augmentation ignores the seed."""
    del seed
    return evaluation_image(jpeg, size)


AUGMENTATIONS = {"none": plain_image, "crop_flip": cropped_and_flipped_image}


def _resize(image, size):
    def bicubic():
        resized = tf.image.resize(image, [size, size], method="bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)

    fits = tf.reduce_all(tf.shape(image)[:2] == size)
    return tf.ensure_shape(tf.cond(fits, lambda: image, bicubic), [size, size, 3])

"""The pipeline to compare with: the same augmentation in PIL, as carefully as PIL allows."""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fne_jax.data.batches import BatchOrder
from fne_jax.data.images.augmentation import FILL, OPERATIONS, Augmentation, sample


def pil_batches(
    files: list[pathlib.Path], order: BatchOrder, steps: range, augmentation: str, size: int
) -> Iterator[np.ndarray]:
    """Yields [batch, size, size, 3] uint8 batches, from files that are read as they come.

    Args:
      files: A JPEG for each pair.
      order: The order of the pairs.
      steps: The batches to yield.
      augmentation: A key of `augmentation.AUGMENTATIONS`.
      size: The pixels of a side.
    """
    for rows in order.rows(steps):
        images = []
        for pair in rows.pair:
            image = Image.open(io.BytesIO(files[pair].read_bytes()))
            width, height = image.size
            sampled = sample(augmentation, order.seed, rows.epoch, int(pair), height, width)
            images.append(np.asarray(_augment(_crop(image, sampled, size), sampled)))
        yield np.stack(images)


def _crop(image: Image.Image, sampled: Augmentation, size: int) -> Image.Image:
    """Decodes no larger than needed, then crops and resizes in one call."""
    width, height = image.size
    top, left, crop_height, crop_width = sampled.window
    least = math.ceil(size * width / crop_width), math.ceil(size * height / crop_height)
    image.draft("RGB", least)
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + crop_width) * x, (top + crop_height) * y)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _augment(image: Image.Image, sampled: Augmentation) -> Image.Image:
    if sampled.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation, argument in zip(sampled.operations, sampled.arguments, strict=True):
        image = _OPERATIONS[OPERATIONS[operation]](image, argument)
    return image


def _affine(image, matrix, resample=Image.Resampling.BILINEAR):
    transform = Image.Transform.AFFINE
    return image.transform(image.size, transform, matrix, resample, fillcolor=(FILL,) * 3)


def _moved(image, x, y):
    # By whole pixels, where PIL need not interpolate.
    return _affine(image, (1, 0, x, 0, 1, y), Image.Resampling.NEAREST)


_OPERATIONS = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "shear_x": lambda image, tangent: _affine(image, (1, -tangent, 0, 0, 1, 0)),
    "shear_y": lambda image, tangent: _affine(image, (1, 0, 0, -tangent, 1, 0)),
    "translate_x": lambda image, pixels: _moved(image, pixels, 0),
    "translate_y": lambda image, pixels: _moved(image, 0, pixels),
    "rotate": lambda image, degrees: image.rotate(
        degrees, Image.Resampling.BILINEAR, fillcolor=(FILL,) * 3
    ),
}


def _decode(jpeg, sampled):
    del sampled
    image = Image.open(io.BytesIO(jpeg))
    image.load()
    return image


def pil_stages(size: int) -> dict[str, Callable]:
    """Returns the stages of an image by name; each takes what the one before gives."""
    return {
        "decode": _decode,
        "crop and resize": lambda image, sampled: _crop(image, sampled, size),
        "mirror and RandAugment": _augment,
        "to an array": lambda image, _: np.asarray(image),
    }

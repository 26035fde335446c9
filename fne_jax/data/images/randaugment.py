"""The operations of `augmentation.OPERATIONS` on [height, width, 3] uint8 pixels, with OpenCV.

They give what the authors' code gives, except for sharpness, where that code wraps around at 0 and
255 and this saturates, and autocontrast, which is PIL's. Where an image is moved, its border
blends with the fill, as OpenCV's bilinear interpolation does and PIL's does not.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from fne_jax.data.images.augmentation import FILL

# PIL's ImageFilter.SMOOTH, which its sharpness pushes away from.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Returns the image with each channel stretched to the full range, as PIL does."""
    table = np.empty((256, 1, 3), np.uint8)
    for channel, counts in enumerate(_histograms(image)):
        low, high = np.flatnonzero(counts)[[0, -1]]
        scale = 255 / (high - low) if high > low else 1
        offset = -low * scale if high > low else 0
        table[:, 0, channel] = np.clip(np.arange(256) * scale + offset, 0, 255)
    return cv2.LUT(image, table)


def equalize(image: np.ndarray) -> np.ndarray:
    """Returns the image with the histogram of each channel evened out, as PIL does."""
    table = np.empty((256, 1, 3), np.uint8)
    for channel, counts in enumerate(_histograms(image)):
        brightest = counts[np.flatnonzero(counts)[-1]]
        step = (counts.sum() - brightest) // 255
        if step == 0:
            table[:, 0, channel] = np.arange(256)
            continue
        below = np.cumsum(counts) - counts
        table[:, 0, channel] = np.minimum((step // 2 + below) // step, 255)
    return cv2.LUT(image, table)


def sharpness(image: np.ndarray, argument: float) -> np.ndarray:
    """Returns the image moved away from a smoothed copy by a factor, as PIL does.

    The outermost pixels stay as they are.
    """
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    sharp = cv2.addWeighted(image, argument, smooth, 1 - argument, -0.499)  # cut off
    for edge in (0, -1):
        sharp[edge], sharp[:, edge] = image[edge], image[:, edge]
    return sharp


def rotate(image: np.ndarray, argument: float) -> np.ndarray:
    """Returns the image turned counterclockwise by the argument in degrees."""
    height, width = image.shape[:2]
    return _warp(image, cv2.getRotationMatrix2D((width / 2, height / 2), argument, 1))


def _histograms(image):
    """Yields the [256] int64 counts of each channel's levels."""
    for channel in range(3):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256])
        yield counts.ravel().astype(np.int64)


def _warp(image, matrix):
    height, width = image.shape[:2]
    return cv2.warpAffine(
        image,
        np.asarray(matrix, np.float64),
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(FILL,) * 3,
    )


def _translate(image, pixels, axis):
    moved = np.full_like(image, FILL)
    length = image.shape[axis] - abs(pixels)
    if length > 0:
        kept, new = [slice(None)] * 2, [slice(None)] * 2
        kept[axis] = slice(max(pixels, 0), max(pixels, 0) + length)
        new[axis] = slice(max(-pixels, 0), max(-pixels, 0) + length)
        moved[tuple(new)] = image[tuple(kept)]
    return moved


# By the names of `augmentation.OPERATIONS`, of an image and an argument.
OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: autocontrast(image),
    "equalize": lambda image, _: equalize(image),
    # PIL cuts off what OpenCV rounds, so nearly a half is taken off before.
    "brightness": lambda image, factor: cv2.convertScaleAbs(image, alpha=factor, beta=-0.499),
    "sharpness": sharpness,
    # Each row is moved right, or each column down, by its number times the argument.
    "shear_x": lambda image, slope: _warp(image, [[1, slope, 0], [0, 1, 0]]),
    "shear_y": lambda image, slope: _warp(image, [[1, 0, 0], [slope, 1, 0]]),
    # To the left, or up, by a number of pixels whose fraction is cut off.
    "translate_x": lambda image, pixels: _translate(image, int(pixels), axis=1),
    "translate_y": lambda image, pixels: _translate(image, int(pixels), axis=0),
    "rotate": rotate,
}

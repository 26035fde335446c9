"""Copies of a split's images that are small enough for a page."""

from __future__ import annotations

import io

from PIL import Image

from fne_jax.data.images import preprocessing
from fne_jax.data.pairs import PairDataset

_JPEG_QUALITY = 75


def small_jpeg(dataset: PairDataset, index: int, longer_side: int) -> bytes:
    """Returns an image as a JPEG without any of its file's metadata.

    Args:
      dataset: The split.
      index: The index of the image.
      longer_side: The most pixels of its longer side; a smaller image keeps its size.

    Raises:
      ValueError: If the image's file is damaged.
    """
    image = dataset.images[index] if dataset.in_memory else dataset.images[index]["image"]
    if isinstance(image, bytes):
        image = preprocessing.decode_jpeg(image, longer_side, longer_side)
    small = Image.fromarray(image)
    small.thumbnail((longer_side, longer_side))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()

"""Images that are given one by one, made into the pixels that a prepared dataset would give."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from etils import epath
from PIL import Image

from fne_jax.data.images.preprocessing import evaluation_image
from fne_jax.data.preparation.image_check import UnusableImage, usable_pixels
from fne_jax.errors import UserError
from fne_jax.files import expand_home

Item = TypeVar("Item")
AnyImage = str | os.PathLike | bytes | Image.Image | np.ndarray

# Arrays that PIL takes as an image: grey, grey of 16 bits, and RGB with transparency.
_ARRAYS = (("uint8", 2, None), ("uint16", 2, None), ("uint8", 3, 4))


def evaluation_pixels(
    image: AnyImage, size: int, *, resize_to: int = 0, name: str = "the image"
) -> np.ndarray:
    """Returns [size, size, 3] uint8 pixels, as evaluation reads them once `prepare` stored them.

    Args:
      image: The path or the content of an image file of any kind that `prepare` takes, an image
        of PIL, or pixels. [height, width, 3] uint8 pixels are taken as they are, like those of
        `npz`; grey ones, 16 bits and an alpha channel go the way of such files.
      size: The pixels of a side of the result.
      resize_to: `config.data.resize_to`.
      name: What messages call an image that is no file.

    Raises:
      UserError: If the image cannot be read, or `prepare` would leave it out.
    """
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return evaluation_image(image, size)
        channels = image.shape[2] if image.ndim == 3 else None
        if (image.dtype.name, image.ndim, channels) not in _ARRAYS:
            raise UserError(
                f"{name}: expected uint8 [height, width, 3], got {image.dtype} {list(image.shape)}"
            )
        image = Image.fromarray(image)
    elif isinstance(image, str | os.PathLike):
        name, image = repr(os.fspath(image)), _content(image)
    elif not isinstance(image, bytes | Image.Image):
        raise UserError(
            f"{name}: expected a path, bytes, an image of PIL or an array, got "
            f"{type(image).__name__}"
        )
    try:
        return evaluation_image(usable_pixels(image, resize_to), size)
    except UnusableImage as fault:
        raise UserError(f"{name}: cannot be used as an image: {fault}") from fault


def read_ahead(
    read: Callable[[Item], np.ndarray], items: Iterable[Item], batch_size: int
) -> Iterator[list[tuple[Item, np.ndarray | UserError]]]:
    """Yields a batch of items at a time with what reading each gave, pixels or its error.

    Several threads read the next batch meanwhile, so that memory holds two. Close the iterator to
    end them.
    """
    rest, ahead = iter(items), collections.deque()
    with concurrent.futures.ThreadPoolExecutor() as readers:
        try:
            while True:
                for _ in range(2 - len(ahead)):
                    if batch := list(itertools.islice(rest, batch_size)):
                        ahead.append([(item, readers.submit(read, item)) for item in batch])
                if not ahead:
                    return
                yield [(item, _outcome(reading)) for item, reading in ahead.popleft()]
        finally:
            readers.shutdown(cancel_futures=True)  # after an error, too


def _outcome(reading):
    try:
        return reading.result()
    except UserError as error:
        return error


def _content(path):
    try:
        file = epath.Path(expand_home(path))
        # A pipe, which epath takes for a file, would be waited for, whatever Ctrl-C says.
        if os.path.exists(file) and not os.path.isfile(file):
            raise UserError(f"{os.fspath(path)!r} is not a file, but a folder, a pipe or a device")
        return file.read_bytes()
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        raise UserError(f"{os.fspath(path)!r}: cannot be read: {error}") from error

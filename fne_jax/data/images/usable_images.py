"""From an image file of any kind to the RGB JPEG to be stored, or to the pixels read of that.

Whether a JPEG is whole is judged by the decoder that training and evaluation read with, so that
they read whatever is accepted here.
"""

from __future__ import annotations

import collections
import concurrent.futures
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import simplejpeg
from etils import epath
from PIL import Image, ImageOps

from fne_jax.data.images.preprocessing import decode_jpeg, evaluation_image
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, expand_home

# What is read, whatever the file's name says. Not what PIL hands to other programs (EPS).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
JPEG_QUALITY = 95  # of images that had to be converted or made smaller
MIN_SIDE = 8  # pixels; a block of a JPEG, and less shows nothing
MAX_PIXELS = 89_478_485  # above it PIL warns of files made to exhaust memory
MAX_SIDE = 65_500  # pixels; libjpeg's own limit
_JPEG_START = b"\xff\xd8"
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
# Arrays that PIL takes as an image: grey, grey of 16 bits, and RGB with transparency.
_ARRAYS = (("uint8", 2, None), ("uint16", 2, None), ("uint8", 3, 4))
AnyImage = str | os.PathLike | bytes | Image.Image | np.ndarray
Item = TypeVar("Item")


class UnusableImage(Exception):
    """An image cannot be used; the message is the reason."""


def usable_jpeg(content: bytes, resize_to: int = 0) -> bytes:
    """Returns an upright RGB JPEG of an image: the content itself where it is one already.

    Others are converted: grey and CMYK become RGB, transparent images are laid on white, 16 bits
    become 8, the image is turned as EXIF says, and of an animation the first frame is taken. The
    result is stored at JPEG quality 95. A shorter side of more than `resize_to` pixels is reduced
    to that (bicubic, antialiased), unless it is 0.

    Raises UnusableImage if it cannot be read to its end, is no image, or is too small or too large.
    """
    if not content:
        raise UnusableImage("the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(image)
            if content.startswith(_JPEG_START):
                # PIL fills damaged places with whatever they decode to, and says nothing.
                _decode_strictly(content, image.mode)
                if _is_plain(image, resize_to):
                    return content
            return _encoded(image, resize_to)
    except UnusableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnusableImage(
            f"not an image of a known kind ({', '.join(FORMATS)}); it begins {content[:16]!r}"
        ) from None
    # Decoders raise almost anything on damaged bytes, and nothing else runs here.
    except Exception as error:
        raise UnusableImage(f"cannot be decoded: {error}") from error


def usable_pixels(image: bytes | Image.Image, resize_to: int = 0) -> np.ndarray:
    """Returns the [height, width, 3] uint8 pixels that are read of an image once it is prepared.

    Unless it was opened from a JPEG that would be stored as it is, an image of PIL goes through the
    stored quality. It takes, and raises, what `usable_jpeg` does.
    """
    if isinstance(image, bytes):
        return decode_jpeg(usable_jpeg(image, resize_to))
    try:
        _check_size(image)
        if image.format in ("JPEG", "MPO") and _is_plain(image, resize_to):
            return np.asarray(image)
        return decode_jpeg(_encoded(image, resize_to))
    except UnusableImage:
        raise
    except Exception as error:
        raise UnusableImage(f"cannot be decoded: {error}") from error


def evaluation_pixels(
    image: AnyImage, size: int, *, resize_to: int = 0, name: str = "the image"
) -> np.ndarray:
    """Returns [size, size, 3] uint8 pixels, as evaluation reads them once `prepare` stored them.

    Of arrays [height, width, 3] uint8 pixels are taken as they are, like those of `npz`; grey ones,
    16 bits and an alpha channel go the way of files of any kind that `prepare` takes, as do images
    of PIL. `resize_to` is `config.data.resize_to`, and `name` what messages call an image that is
    not a file.

    Raises UserError if the image cannot be read, or `prepare` would leave it out.
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
    # A NUL in the name is a ValueError.
    with as_user_error(f"{os.fspath(path)!r}: cannot be read", errors=(OSError, ValueError)):
        file = epath.Path(expand_home(path))
        # A pipe, which epath takes for a file, would be waited for, whatever Ctrl-C says.
        if os.path.exists(file) and not os.path.isfile(file):
            raise UserError(f"{os.fspath(path)!r} is not a file, but a folder, a pipe or a device")
        return file.read_bytes()


def _decode_strictly(content, mode):
    if mode == "CMYK":  # which is converted by PIL, and need only be whole here
        simplejpeg.decode_jpeg(content, colorspace="CMYK")
    else:
        decode_jpeg(content)


def _check_size(image):
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise UnusableImage(f"too small: {width} x {height} pixels, a side below {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise UnusableImage(f"too large: {width} x {height} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_SIDE:
        raise UnusableImage(f"too large: {width} x {height} pixels, a side above {MAX_SIDE:,}")


def _is_plain(image, resize_to):
    """Returns whether a JPEG is stored as it is."""
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    return image.mode == "RGB" and upright and not _shrinks(image, resize_to)


def _shrinks(image, resize_to):
    return 0 < resize_to < min(image.size)


def _encoded(image, resize_to):
    rgb = _rgb(ImageOps.exif_transpose(image))
    if _shrinks(rgb, resize_to):
        scale = resize_to / min(rgb.size)
        size = tuple(max(resize_to, round(side * scale)) for side in rgb.size)
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    rgb.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def _rgb(image):
    if image.mode == "F":
        raise UnusableImage("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip
        levels = np.clip(np.asarray(image), 0, 65535) / 257
        return Image.fromarray(np.round(levels).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")

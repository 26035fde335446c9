"""From the bytes of an image file to an RGB JPEG, or the reason why there is none.

Whether a JPEG is whole is judged by the decoder that training and evaluation read with, so that
they read whatever is accepted here.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from fne_jax.data.images.preprocessing import decode_jpeg

# What is read, whatever the file's name says. Not what PIL hands to other programs (EPS).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
JPEG_QUALITY = 95  # of images that had to be converted or made smaller
MIN_SIDE = 8  # pixels; a block of a JPEG, and less shows nothing
MAX_PIXELS = 89_478_485  # above it PIL warns of files made to exhaust memory
MAX_SIDE = 65_500  # pixels; libjpeg's own limit
_JPEG_START = b"\xff\xd8"
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright


class UnusableImage(Exception):
    """An image cannot be used; the message is the reason."""


def usable_jpeg(content: bytes, resize_to: int = 0) -> bytes:
    """Returns an upright RGB JPEG of an image: the content itself where it is one already.

    Others are converted: grey and CMYK become RGB, transparent images are laid on white, 16 bits
    become 8, the image is turned as EXIF says, and of an animation the first frame is taken. The
    result is stored at JPEG quality 95.

    Args:
      content: The content of an image file.
      resize_to: The pixels that the shorter side is reduced to (bicubic, antialiased) where it is
        longer; 0 leaves the size.

    Raises:
      UnusableImage: If it cannot be read to its end, is no image, or is too small or too large.
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

    Args:
      image: The content of an image file, or an image that PIL has opened or made. Unless it was
        opened from a JPEG that would be stored as it is, it goes through the stored quality.
      resize_to: As for `usable_jpeg`.

    Raises:
      UnusableImage: If it cannot be used.
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

"""From the bytes of an image file to an RGB JPEG, or the reason why there is none."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

# What is read, whatever the file's name says. Not what PIL hands to other programs (EPS).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
JPEG_QUALITY = 95  # of images that had to be converted or made smaller
MIN_SIDE = 8  # pixels; a block of a JPEG, and less shows nothing
MAX_PIXELS = 89_478_485  # above it PIL warns of files made to exhaust memory
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"  # markers
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
            return _converted(image, content, resize_to)
    except UnusableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnusableImage(
            f"not an image of a known kind ({', '.join(FORMATS)}); it begins {content[:16]!r}"
        ) from None
    # Decoders raise almost anything on damaged bytes, and nothing else runs here.
    except Exception as error:
        raise UnusableImage(f"cannot be decoded: {error}") from error


def _converted(image, content, resize_to):
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise UnusableImage(f"too small: {width} x {height} pixels, a side below {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise UnusableImage(f"too large: {width} x {height} pixels, more than {MAX_PIXELS:,}")
    image.load()  # all of it, so that what is cut off shows
    # What lacks an end but was filled up, as broken downloads are, decodes to a grey half.
    if image.format == "JPEG" and content.rfind(_JPEG_END) < content.rfind(_JPEG_SCAN):
        raise UnusableImage("cannot be decoded: the JPEG has no end, it was cut off")
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    shrinks = 0 < resize_to < min(width, height)
    if image.format == "JPEG" and image.mode == "RGB" and upright and not shrinks:
        return content
    rgb = _rgb(ImageOps.exif_transpose(image))
    if shrinks:
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

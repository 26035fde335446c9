"""From the bytes of a picture file to an RGB JPEG, or the reason why there is none."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

# What is read, whatever the file's name says. Not what PIL hands to other programs (EPS).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
JPEG_QUALITY = 95  # of pictures that had to be converted or made smaller
MIN_SIDE = 8  # pixels; a block of a JPEG, and less shows nothing
MAX_PIXELS = 89_478_485  # above it PIL warns of files made to exhaust memory
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"  # markers
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright


class UnusablePicture(Exception):
    """The message is the reason."""


def usable_jpeg(content: bytes, resize_to: int = 0) -> bytes:
    """Returns an upright RGB JPEG of a picture: the content itself where it is one already.

    Others are converted: grey and CMYK to RGB, transparent ones laid on white, 16 bits to 8, turned
    as EXIF says, of an animation the first frame; and stored at JPEG quality 95.

    Args:
      content: of a picture file.
      resize_to: pixels; where the shorter side is longer, the picture is made smaller (bicubic,
        antialiased) until it is as long. 0 leaves the size.

    Raises:
      UnusablePicture: if it cannot be read whole, is no picture, or too small or too large.
    """
    if not content:
        raise UnusablePicture("the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            return _converted(picture, content, resize_to)
    except UnusablePicture:
        raise
    except Image.UnidentifiedImageError:
        raise UnusablePicture(
            f"not a picture of a known kind ({', '.join(FORMATS)}); it begins {content[:16]!r}"
        ) from None
    # Decoders raise almost anything on damaged bytes, and nothing else runs here.
    except Exception as error:
        raise UnusablePicture(f"cannot be decoded: {error}") from error


def _converted(picture, content, resize_to):
    width, height = picture.size
    if min(width, height) < MIN_SIDE:
        raise UnusablePicture(f"too small: {width} x {height} pixels, a side below {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise UnusablePicture(f"too large: {width} x {height} pixels, more than {MAX_PIXELS:,}")
    picture.load()  # all of it, so that what is cut off shows
    # What lacks an end but was filled up, as broken downloads are, decodes to a grey half.
    if picture.format == "JPEG" and content.rfind(_JPEG_END) < content.rfind(_JPEG_SCAN):
        raise UnusablePicture("cannot be decoded: the JPEG has no end, it was cut off")
    upright = picture.getexif().get(_ORIENTATION, 1) == 1
    shrinks = 0 < resize_to < min(width, height)
    if picture.format == "JPEG" and picture.mode == "RGB" and upright and not shrinks:
        return content
    rgb = _rgb(ImageOps.exif_transpose(picture))
    if shrinks:
        scale = resize_to / min(rgb.size)
        size = tuple(max(resize_to, round(side * scale)) for side in rgb.size)
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    rgb.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def _rgb(picture):
    if picture.mode == "F":
        raise UnusablePicture("floating-point pixels, whose range is not known")
    if picture.mode.startswith("I"):  # 16 bits, which PIL would clip
        levels = np.clip(np.asarray(picture), 0, 65535) / 257
        return Image.fromarray(np.round(levels).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")

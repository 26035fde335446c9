"""What is stored of each kind of image, pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from fne_jax.data.images.usable_images import UnusableImage, usable_jpeg
from tests.support.sources import DAMAGED_IMAGES, encoded, jpeg, pixels


def decoded(content):
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert image.getexif().get(0x0112, 1) == 1
        return np.array(image).astype(int)


def assert_close(content, expected, tolerance=4):
    stored = decoded(content)
    assert stored.shape == expected.shape
    assert np.abs(stored - expected).mean() < tolerance


def with_orientation(kind, value):
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(pixels(), kind, exif=exif)


def test_plain_jpegs_stay_byte_for_byte():
    for content in (jpeg(), with_orientation("JPEG", 1), encoded(pixels(), progressive=True)):
        assert usable_jpeg(content) is content
        assert usable_jpeg(content, resize_to=29) is content


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_other_formats_are_converted_whatever_their_name(kind):
    lossy = 12 if kind in ("GIF", "WEBP") else 4
    assert_close(usable_jpeg(encoded(pixels(), kind)), pixels(), lossy)


def test_grey_and_cmyk_become_rgb():
    grey = Image.fromarray(pixels()).convert("L")
    as_rgb = np.repeat(np.array(grey)[..., None], 3, axis=2)
    assert_close(usable_jpeg(encoded(grey)), as_rgb)
    levels = np.array(grey).astype(np.uint16) * 257
    assert_close(usable_jpeg(encoded(levels, "PNG")), as_rgb)
    cmyk = Image.fromarray(pixels()).convert("CMYK")
    assert_close(usable_jpeg(encoded(cmyk, quality=95)), pixels(), 6)


def test_transparency_is_laid_on_white():
    alpha = np.zeros((29, 41), np.uint8)
    alpha[:, 20:] = 255
    expected = pixels().copy()
    expected[:, :20] = 255
    content = encoded(np.dstack([pixels(), alpha]), "PNG")
    assert_close(usable_jpeg(content), expected, 5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (3, lambda p: p[::-1, ::-1]),
        (2, lambda p: p[:, ::-1]),
        (6, lambda p: np.rot90(p, -1)),
        (8, lambda p: np.rot90(p)),
    ],
)
def test_orientation_is_applied(kind, orientation, turn):
    assert_close(usable_jpeg(with_orientation(kind, orientation)), turn(pixels()))


def test_larger_images_are_stored_smaller():
    wide = encoded(pixels(width=300, height=120), quality=95)
    small = Image.fromarray(pixels(width=300, height=120)).resize((100, 40), Image.BICUBIC)
    assert_close(usable_jpeg(wide, resize_to=40), np.array(small))
    assert decoded(usable_jpeg(with_orientation("JPEG", 6), resize_to=10)).shape == (14, 10, 3)
    # Resized without filtering, stripes of one pixel would stay stripes or vanish into one colour.
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(decoded(usable_jpeg(encoded(stripes, "PNG"), resize_to=16)) - 127.5).max() < 12


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "the file is empty"),
        ("a page of HTML", "not an image of a known kind"),
        ("noise", "not an image of a known kind"),
        ("JPEG cut off", "cannot be decoded: Premature end of JPEG file"),
        ("JPEG cut off and filled with zeros", "cannot be decoded"),
        ("PNG cut off", "cannot be decoded: .*truncated"),
        ("JPEG without its tables", "cannot be decoded"),
        ("one pixel wide", "too small: 1 x 43 pixels"),
        ("floating-point TIFF", "floating-point"),
        ("an EPS program", "not an image of a known kind"),
    ],
)
def test_reasons(kind, reason):
    with pytest.raises(UnusableImage, match=reason):
        usable_jpeg(DAMAGED_IMAGES[kind](3))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_made_to_exhaust_memory():
    header = encoded(Image.new("1", (9000, 10000)), "PNG")
    with pytest.raises(UnusableImage, match="too large: 9000 x 10000"):
        usable_jpeg(header)

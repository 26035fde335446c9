"""An image that is given by itself looks to the model as it would in a prepared dataset."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from fne_jax.data.images.preprocessing import evaluation_image
from fne_jax.data.images.usable_images import evaluation_pixels, usable_jpeg
from fne_jax.errors import UserError
from tests.support.sources import encoded, jpeg, pixels


def turned(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(pixels(width=60), kind, exif=exif)


GREY = pixels()[..., 0]
RGBA = np.dstack([pixels(), GREY])
FILES = {
    "a plain JPEG": jpeg(),
    "a turned JPEG": turned("JPEG"),
    "a turned PNG": turned("PNG"),
    "a grey JPEG": encoded(GREY),
    "a CMYK JPEG": encoded(Image.fromarray(pixels()).convert("CMYK")),
    "a transparent PNG": encoded(RGBA, "PNG"),
    "a PNG of 16 bits": encoded(GREY.astype(np.uint16) * 257, "PNG"),
    "a GIF": encoded(pixels(), "GIF"),
}


@pytest.mark.parametrize("kind", list(FILES))
@pytest.mark.parametrize("resize_to", [0, 16])
def test_files_bytes_and_pil_images_are_as_prepared(tmp_path, kind, resize_to):
    content = FILES[kind]
    expected = evaluation_image(usable_jpeg(content, resize_to), 12)
    path = tmp_path / "an image"
    path.write_bytes(content)
    for image in (content, path, str(path), Image.open(io.BytesIO(content))):
        given = evaluation_pixels(image, 12, resize_to=resize_to)
        np.testing.assert_array_equal(given, expected)


def test_arrays_are_pixels_or_go_as_a_file_of_their_kind():
    np.testing.assert_array_equal(
        evaluation_pixels(pixels(), 12), evaluation_image(pixels(), 12), "as they are"
    )
    for array in (GREY, GREY.astype(np.uint16) * 257, RGBA):
        as_file = evaluation_pixels(encoded(array, "PNG"), 12)
        np.testing.assert_array_equal(evaluation_pixels(array, 12), as_file)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (jpeg()[:300], r"images\[1\]: cannot be used as an image: cannot be decoded"),
        (b"", r"images\[1\]: cannot be used as an image: the file is empty"),
        (pathlib.Path("/nowhere/a.jpg"), "/nowhere/a.jpg': cannot be read"),
        ("a\0.jpg", "cannot be read: .*null byte"),
        (np.zeros((9, 9, 3)), r"images\[1\]: expected uint8 \[height, width, 3\], got float64"),
        (np.zeros((0, 9, 3), np.uint8), r"images\[1\]: expected uint8"),
        (np.zeros((9, 3), np.uint8), r"images\[1\]: .*too small: 3 x 9"),
        (None, r"images\[1\]: expected a path, bytes, .* got NoneType"),
    ],
)
def test_what_cannot_be_used_is_named(image, message):
    with pytest.raises(UserError, match=message):
        evaluation_pixels(image, 12, name="images[1]")

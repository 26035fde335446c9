"""Draws as the paper makes them, the evaluation resize as PIL's, and training's close to it."""

import io

import numpy as np
import pytest
from PIL import Image

from fne_jax.data.images import augmentation, preprocessing
from fne_jax.data.images.augmentation import ARGUMENTS, OPERATIONS, SIGNED
from fne_jax.data.images.training_rows import DeviceRows, HostRows, PlainRows
from fne_jax.errors import UserError


def picture_of(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (6, 5, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg_of(height, width, seed=0, mode="RGB"):
    stream = io.BytesIO()
    picture_of(height, width, seed).convert(mode).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def windows(height, width, count):
    return np.array(
        [augmentation.draw("crop_flip", 7, 0, n, height, width).window for n in range(count)]
    )


def slow_window(rng, height, width):
    """RandomResizedCrop in plain Python: the height and width of the first draw that fits."""
    while True:
        area = height * width * rng.uniform(0.5, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w <= width and h <= height:
            return h, w


def test_crops_have_the_paper_s_areas_and_aspects():
    top, left, height, width = windows(300, 400, 2000).T.astype(float)
    area, aspect = height * width / (300 * 400), width / height
    assert area.min() > 0.49 and area.max() <= 1.0
    assert aspect.min() > 0.74 and aspect.max() < 1.345
    expected = np.array([slow_window(np.random.default_rng(n), 300, 400) for n in range(2000)])
    slow_area = expected[:, 0] * expected[:, 1] / (300 * 400)
    slow_aspect = expected[:, 1] / expected[:, 0]
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(np.quantile(area, share) - np.quantile(slow_area, share)) < 0.02
        assert abs(np.quantile(aspect, share) - np.quantile(slow_aspect, share)) < 0.03
    assert (top >= 0).all() and (top + height <= 300).all()
    assert (left >= 0).all() and (left + width <= 400).all()
    # Anywhere that there is room, to the last pixel.
    room = 400 - width
    assert abs((left[room > 9] / room[room > 9]).mean() - 0.5) < 0.03
    assert (left == room).any() and (left == 0).any()


def test_a_picture_too_narrow_for_any_crop_gives_its_middle():
    np.testing.assert_array_equal(windows(10, 400, 5), [[0, 193, 10, 13]] * 5)
    np.testing.assert_array_equal(windows(400, 10, 5), [[193, 0, 13, 10]] * 5)
    np.testing.assert_array_equal(windows(1, 1, 5), [[0, 0, 1, 1]] * 5)


@pytest.mark.parametrize("name", ["crop_flip", "randaugment"])
def test_half_of_the_pictures_are_mirrored(name):
    mirrored = [augmentation.draw(name, 1, 0, n, 32, 32).mirrored for n in range(2000)]
    assert abs(np.mean(mirrored) - 0.5) < 0.04


def test_operations_are_drawn_and_applied_as_often_as_they_should():
    count = 20000
    drawn = [augmentation.draw("randaugment", 0, 0, n, 30, 40) for n in range(count)]
    operations = np.array([d.operations for d in drawn])
    arguments = np.array([d.arguments for d in drawn])
    assert operations.shape == (count, 2)
    for index, name in enumerate(OPERATIONS):
        expected = 0.05 + 0.5 * (name == "identity")
        chosen = operations == index
        for place in range(2):
            assert abs(chosen[:, place].mean() - expected) < 0.015
        np.testing.assert_array_equal(np.abs(arguments[chosen]), ARGUMENTS.get(name, 0.0))
        if name in SIGNED:
            assert abs((arguments[chosen] < 0).mean() - 0.5) < 0.04
        else:
            assert (arguments[chosen] >= 0).all()
    # With replacement, and the second whatever the first.
    same = (operations[:, 0] == operations[:, 1]) & (operations[:, 0] > 0)
    assert abs(same.mean() - 9 * 0.05**2) < 0.006


def test_draws_are_a_function_of_seed_epoch_and_pair():
    def drawn(*where):
        return augmentation.draw("randaugment", *where, 300, 400)

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({drawn(*where) for where in ((1, 2, 3), (0, 2, 3), (1, 3, 3), (1, 2, 4))}) == 4


@pytest.mark.parametrize("rows", [HostRows, DeviceRows])
def test_rows_have_the_arrays_that_they_announce(rows):
    make = rows(0, "randaugment", 12)
    for picture in (jpeg_of(40, 50), np.asarray(picture_of(9, 70)), jpeg_of(11, 8, mode="L")):
        row = make(picture, 0, 5)
        assert {k: (v.shape, v.dtype) for k, v in row.items()} == {
            k: (shape, np.dtype(dtype)) for k, (shape, dtype) in make.signature.items()
        }


def test_rows_without_augmentation_are_evaluation_s():
    jpeg = jpeg_of(40, 50)
    row = PlainRows(16)(jpeg, 3, 4)["image"]
    np.testing.assert_array_equal(row, preprocessing.evaluation_image(jpeg, 16))


@pytest.mark.parametrize("shape", [(40, 50), (13, 90), (16, 16)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_evaluation_resize_is_pils_bicubic(shape, mode):
    jpeg = jpeg_of(*shape, mode=mode)
    pil = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(preprocessing.evaluation_image(jpeg, 16), np.asarray(pil))


def test_training_resize_is_close_to_pils():
    image = np.asarray(picture_of(120, 100))
    for height, width in ((240, 170), (120, 100), (110, 80), (70, 90), (61, 51), (40, 70)):
        ours = preprocessing.fast_resize(image, height, width)
        pil = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        assert np.abs(ours.astype(int) - np.asarray(pil)).mean() < 0.75, (height, width)


def test_large_windows_are_decoded_at_a_fraction(monkeypatch):
    shapes = []

    def resize(image, height, width):
        shapes.append(image.shape[:2])
        return whole_resize(image, height, width)

    whole_resize = preprocessing.fast_resize
    monkeypatch.setattr(preprocessing, "fast_resize", resize)
    jpeg = jpeg_of(200, 320)
    for size in (30, 60, 90):
        window = (8, 16, 184, 288)
        ours = preprocessing.crop(jpeg, window, size).astype(int)
        cropped = Image.open(io.BytesIO(jpeg)).crop((16, 8, 304, 192))
        pil = np.asarray(cropped.resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(ours - pil).mean() < 1
    assert shapes == [(46, 72), (69, 108), (92, 144)]


def test_a_picture_is_fitted_into_a_square_or_left_alone():
    jpeg = jpeg_of(30, 50)
    np.testing.assert_array_equal(
        preprocessing.fitted(jpeg, 50), np.asarray(Image.open(io.BytesIO(jpeg)))
    )
    assert preprocessing.fitted(jpeg, 40).shape == (24, 40, 3)
    assert preprocessing.fitted(jpeg_of(1, 300), 40).shape == (1, 40, 3)


def test_damage_is_an_error_rather_than_grey():
    jpeg = jpeg_of(64, 64)
    for damaged in (jpeg[: len(jpeg) // 2], jpeg[:-2], b"", b"no picture"):
        with pytest.raises(ValueError):
            preprocessing.decode_jpeg(damaged)


def test_picture_files_come_upright_or_with_a_clear_error(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: its top is on the right
    picture_of(30, 20).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = Image.open(tmp_path / "turned.jpg").transpose(Image.Transpose.ROTATE_270)
    expected = np.asarray(upright.resize((8, 8), Image.Resampling.BICUBIC))
    ours = preprocessing.read_picture(tmp_path / "turned.jpg", 8)
    np.testing.assert_array_equal(ours, expected)
    (tmp_path / "cut.jpg").write_bytes(jpeg_of(30, 30)[:400])
    for name in ("cut.jpg", "missing.jpg"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as a picture"):
            preprocessing.read_picture(tmp_path / name, 8)

"""The evaluation resize is PIL's, training's is close to it, and damage is an error."""

import io

import numpy as np
import pytest
from PIL import Image

from fne_jax.data.images import augmentation, preprocessing
from fne_jax.data.images.preprocessing import TrainingImages


def image_of(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (6, 5, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg_of(height, width, seed=0, mode="RGB"):
    stream = io.BytesIO()
    image_of(height, width, seed).convert(mode).save(stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["none", "crop_flip", "randaugment"])
def test_training_images_have_one_size_whatever_they_are_made_of(name):
    make_image = TrainingImages(12, name, seed=0)
    for image in (jpeg_of(40, 50), np.asarray(image_of(9, 70)), jpeg_of(11, 8, mode="L")):
        made = make_image(image, 0, 5)
        assert made.shape == (12, 12, 3) and made.dtype == np.uint8


def test_training_images_are_cropped_and_augmented_as_sampled():
    jpeg = jpeg_of(40, 50)
    for epoch in range(6):
        sampled = augmentation.sample("randaugment", 3, epoch, 5, 40, 50)
        expected = preprocessing.crop(jpeg, sampled.window, 16)
        if sampled.mirrored:
            expected = expected[:, ::-1]
        plain = augmentation.Augmentation(
            sampled.window, False, sampled.operations, sampled.arguments
        )
        expected = preprocessing.augment_image(np.ascontiguousarray(expected), plain)
        made = TrainingImages(16, "randaugment", seed=3)(jpeg, epoch, 5)
        np.testing.assert_array_equal(made, expected)


def test_training_images_without_augmentation_are_evaluation_s():
    jpeg = jpeg_of(40, 50)
    made = TrainingImages(16, "none", seed=0)(jpeg, 3, 4)
    np.testing.assert_array_equal(made, preprocessing.evaluation_image(jpeg, 16))


@pytest.mark.parametrize("shape", [(40, 50), (13, 90), (16, 16)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_evaluation_resize_is_pils_bicubic(shape, mode):
    jpeg = jpeg_of(*shape, mode=mode)
    pil = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(preprocessing.evaluation_image(jpeg, 16), np.asarray(pil))


def test_training_resize_is_close_to_pils():
    image = np.asarray(image_of(120, 100))
    for height, width in ((240, 170), (120, 100), (110, 80), (70, 90), (61, 51), (40, 70)):
        ours = preprocessing.fast_resize(image, height, width)
        pil = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        assert np.abs(ours.astype(int) - np.asarray(pil)).mean() < 0.75, (height, width)


def test_large_windows_are_decoded_at_a_fraction(monkeypatch):
    shapes = []

    def resize(image, height, width):
        shapes.append(image.shape[:2])
        return real_resize(image, height, width)

    real_resize = preprocessing.fast_resize
    monkeypatch.setattr(preprocessing, "fast_resize", resize)
    jpeg = jpeg_of(200, 320)
    for size in (30, 60, 90):
        window = (8, 16, 184, 288)
        ours = preprocessing.crop(jpeg, window, size).astype(int)
        cropped = Image.open(io.BytesIO(jpeg)).crop((16, 8, 304, 192))
        pil = np.asarray(cropped.resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(ours - pil).mean() < 1
    assert shapes == [(46, 72), (69, 108), (92, 144)]


def test_damage_is_an_error_rather_than_grey():
    jpeg = jpeg_of(64, 64)
    for damaged in (jpeg[: len(jpeg) // 2], jpeg[:-2], b"", b"no image"):
        with pytest.raises(ValueError):
            preprocessing.decode_jpeg(damaged)

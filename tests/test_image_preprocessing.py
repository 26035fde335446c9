"""Crops as the paper draws them, and the resize as PIL does it."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from fne_jax.data import image_preprocessing as preprocessing


def jpeg_of(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (6, 5, 3)).astype(np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=95)
    return stream.getvalue()


def windows(height, width, count):
    draw = tf.function(
        lambda seed: preprocessing.random_crop_window(tf.constant([height, width, 3]), seed)
    )
    return np.array([draw(tf.constant([7, n])).numpy() for n in range(count)])


def slow_window(rng, height, width):
    """RandomResizedCrop in plain Python: the height and width of the first draw that fits."""
    while True:
        area = height * width * rng.uniform(0.5, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w <= width and h <= height:
            return h, w


def test_crops_have_the_paper_s_areas_and_aspects():
    top, left, height, width = windows(300, 400, 600).T.astype(float)
    area, aspect = height * width / (300 * 400), width / height
    assert area.min() > 0.49 and area.max() <= 1.0
    assert aspect.min() > 0.74 and aspect.max() < 1.345
    expected = np.array([slow_window(np.random.default_rng(n), 300, 400) for n in range(2000)])
    assert abs(area.mean() - (expected[:, 0] * expected[:, 1]).mean() / (300 * 400)) < 0.02
    assert abs(aspect.mean() - (expected[:, 1] / expected[:, 0]).mean()) < 0.03
    assert (top >= 0).all() and (top + height <= 300).all()
    assert (left >= 0).all() and (left + width <= 400).all()
    assert len(np.unique(left)) > 50 and len(np.unique(top)) > 50


def test_a_picture_too_narrow_for_any_crop_gives_its_middle():
    found = windows(10, 400, 5)
    np.testing.assert_array_equal(found, [[0, 193, 10, 13]] * 5)


def test_half_of_the_pictures_are_mirrored():
    jpeg = jpeg_of(32, 32)
    augment = tf.function(lambda seed: preprocessing.cropped_and_flipped_image(jpeg, 16, seed))
    upright = preprocessing.evaluation_image(jpeg, 16).numpy().astype(int)
    mirrored = 0
    for n in range(200):
        image = augment(tf.constant([1, n])).numpy().astype(int)
        assert image.shape == (16, 16, 3)
        nearer = np.abs(image - upright[:, ::-1]).mean() < np.abs(image - upright).mean()
        mirrored += nearer
    assert 75 < mirrored < 125


def test_draws_are_a_function_of_the_seed():
    jpeg = jpeg_of(40, 50)
    first, again, other = (
        preprocessing.cropped_and_flipped_image(jpeg, 16, tf.constant(seed)).numpy()
        for seed in ([1, 2], [1, 2], [1, 3])
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("shape", [(40, 50), (13, 90), (16, 16)])
def test_evaluation_resize_is_pils_bicubic(shape):
    jpeg = jpeg_of(*shape)
    ours = preprocessing.evaluation_image(jpeg, 16).numpy().astype(int)
    pil = np.array(Image.open(io.BytesIO(jpeg)).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.abs(ours - pil).mean() < 1

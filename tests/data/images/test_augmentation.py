"""Augmentation is sampled as the paper does, as a function of seed, epoch and pair."""

import numpy as np
import pytest

from fne_jax.data.images import augmentation
from fne_jax.data.images.augmentation import ARGUMENTS, OPERATIONS, SIGNED


def windows(height, width, count):
    return np.array(
        [augmentation.sample("crop_flip", 7, 0, n, height, width).window for n in range(count)]
    )


def slow_window(rng, height, width):
    """RandomResizedCrop in plain Python: the height and width of the first sample that fits."""
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


def test_an_image_too_narrow_for_any_crop_gives_its_middle():
    np.testing.assert_array_equal(windows(10, 400, 5), [[0, 193, 10, 13]] * 5)
    np.testing.assert_array_equal(windows(400, 10, 5), [[193, 0, 13, 10]] * 5)
    np.testing.assert_array_equal(windows(1, 1, 5), [[0, 0, 1, 1]] * 5)


@pytest.mark.parametrize("name", ["crop_flip", "randaugment"])
def test_half_of_the_images_are_mirrored(name):
    mirrored = [augmentation.sample(name, 1, 0, n, 32, 32).mirrored for n in range(2000)]
    assert abs(np.mean(mirrored) - 0.5) < 0.04


def test_operations_are_sampled_as_often_as_they_should():
    count = 20000
    sampled = [augmentation.sample("randaugment", 0, 0, n, 30, 40) for n in range(count)]
    operations = np.array([one.operations for one in sampled])
    arguments = np.array([one.arguments for one in sampled])
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


def test_samples_are_a_function_of_seed_epoch_and_pair():
    def sampled(*where):
        return augmentation.sample("randaugment", *where, 300, 400)

    assert sampled(1, 2, 3) == sampled(1, 2, 3)
    assert len({sampled(*where) for where in ((1, 2, 3), (0, 2, 3), (1, 3, 3), (1, 2, 4))}) == 4

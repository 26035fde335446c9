"""RandAugment's operations and the evaluation resize against the authors' figures.

Theirs are of photographs that may not be distributed, so the repository holds figures of rendered
images in the same layout, which tests/support/plain_operations.py writes; `--golden DIR` reads
theirs.

Mean absolute differences are in levels of 255. What is moved agrees at its borders too: the figures
blend with the fill there as ours do (PIL's would not). Sharpness leaves the outermost pixels alone
in both; inside it differs where the authors' wraps around at 0 and 255 and ours saturates.
"""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fne_jax.data.images import preprocessing, randaugment
from fne_jax.data.images.augmentation import ARGUMENTS, OPERATIONS
from fne_jax.encoders.inputs import normalize_pixels
from tests.support.plain_operations import FIGURES, PIXELS_MEAN, PIXELS_STD


@pytest.fixture(scope="module")
def figures(golden):
    return np.load(golden / "images.npz")


def cases(figures, name):
    """Yields the image, the argument and the result of an operation."""
    number = 0
    while f"args_{FIGURES[name]}_{number}" in figures:
        argument = float(figures[f"args_{FIGURES[name]}_{number}"])
        for image in ("image0", "image1"):
            yield figures[image], argument, figures[f"{image}_{FIGURES[name]}_{number}"]
        number += 1


def test_the_arguments_are_ours(figures):
    for name in OPERATIONS:
        arguments = {abs(argument) for _, argument, _ in cases(figures, name)}
        assert arguments == {ARGUMENTS.get(name, 0.0)}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(figures, name):
    for image, argument, expected in cases(figures, name):
        ours = randaugment.OPERATIONS[name](image, argument)
        difference = np.abs(ours.astype(int) - expected)
        if name == "sharpness":
            # All of the difference is where theirs wrapped around.
            assert difference.mean() < 1 and (difference[difference > 1] > 200).all()
        else:
            # Where a plain loop rounds exactly, OpenCV's fixed point may be a level off.
            assert difference.mean() < 0.3 and difference.max() <= 1


def test_evaluation_resize_and_normalisation(figures):
    for name in ("image0", "image1"):
        ours = preprocessing.evaluation_image(figures[name], 96)
        np.testing.assert_array_equal(ours, figures[f"{name}_eval96_uint8"])
        normalised = normalize_pixels(jnp.asarray(ours[None]), PIXELS_MEAN, PIXELS_STD)[0]
        expected = figures[f"{name}_eval96_normalised"]
        if expected.shape[0] == 3:
            expected = expected.transpose(1, 2, 0)
        np.testing.assert_allclose(normalised, expected, atol=1e-5)


def test_training_resize_is_within_a_level_of_pil(figures):
    top, left, height, width = window = (11, 7, 144, 149)
    for name in ("image0", "image1"):
        stream = io.BytesIO()
        Image.fromarray(figures[name]).save(stream, "JPEG", quality=95)
        cropped = Image.open(stream).crop((left, top, left + width, top + height))
        for size in (90, 120, 140, 230):
            pil = np.asarray(cropped.resize((size, size), Image.Resampling.BICUBIC))
            ours = preprocessing.crop(stream.getvalue(), window, size)
            assert np.abs(ours.astype(int) - pil).mean() < 0.75, size

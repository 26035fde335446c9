"""RandAugment's operations against PIL and plain loops."""

import numpy as np
import pytest
from PIL import Image

from fne_jax.data.images import randaugment
from fne_jax.data.images.augmentation import FILL
from tests.support.plain_operations import slow_move, with_pil

# Uneven, so that a wrong axis shows.
SHAPE = (37, 52)


def images():
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(20, 230, (7, 9, 3)).astype(np.uint8))
    smooth = np.array(small.resize(SHAPE[::-1], Image.Resampling.BICUBIC))
    smooth[..., 1] = 90  # one channel without contrast
    noise = rng.integers(0, 256, (*SHAPE, 3)).astype(np.uint8)
    return {"smooth": smooth, "noise": noise, "black": np.zeros_like(noise)}


def apply(image, name, argument):
    return randaugment.OPERATIONS[name](image, argument)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("identity", 0.0), ("autocontrast", 0.0), ("equalize", 0.0), ("brightness", 1.36),
        ("brightness", 0.7), ("sharpness", 1.36), ("sharpness", 0.4),
    ],
)  # fmt: skip
def test_levels_change_as_pils_do(name, argument):
    for kind, image in images().items():
        difference = np.abs(
            apply(image, name, argument).astype(int) - with_pil(name, image, argument)
        )
        assert difference.max() == 0, kind


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "argument"),
    [("shear_x", 0.21), ("shear_y", 0.21), ("translate_x", 7.0), ("translate_y", 7.0),
     ("rotate", 21.0)],
)  # fmt: skip
def test_pixels_move_as_a_plain_loop_moves_them(name, argument, sign):
    for image in images().values():
        expected = slow_move(image, name, sign * argument)
        difference = np.abs(apply(image, name, sign * argument) - expected)
        assert difference.max() <= 1 and difference.mean() < 0.3


def test_an_image_smaller_than_the_translation_is_all_fill():
    image = np.zeros((9, 5, 3), np.uint8)
    assert (apply(image, "translate_x", 7.0) == FILL).all()
    assert (apply(image, "translate_y", -7.0)[:7] == FILL).all()

"""RandAugment's operations, on the host and on the device, against PIL and plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fne_jax.data.images import device_augmentation, randaugment
from fne_jax.data.images.augmentation import FILL, OPERATIONS
from fne_jax.data.images.training_rows import DeviceRows, HostRows
from tests.support.plain_operations import slow_move, with_pil

# Uneven, so that a wrong axis shows.
SHAPE = (37, 52)


def pictures():
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(20, 230, (7, 9, 3)).astype(np.uint8))
    smooth = np.array(small.resize(SHAPE[::-1], Image.Resampling.BICUBIC))
    smooth[..., 1] = 90  # one channel without contrast
    noise = rng.integers(0, 256, (*SHAPE, 3)).astype(np.uint8)
    return {"smooth": smooth, "noise": noise, "black": np.zeros_like(noise)}


@functools.cache
def compiled():
    return jax.jit(device_augmentation.apply_operation)


def on_host(image, name, argument=0.0):
    return randaugment.apply_operation(image, OPERATIONS.index(name), argument)


def on_device(image, name, argument=0.0):
    index = jnp.int32(OPERATIONS.index(name))
    return np.asarray(compiled()(image, index, jnp.float32(argument)))


@pytest.mark.parametrize("apply", [on_host, on_device])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("identity", 0.0), ("autocontrast", 0.0), ("equalize", 0.0), ("brightness", 1.36),
        ("brightness", 0.7), ("sharpness", 1.36), ("sharpness", 0.4),
    ],
)  # fmt: skip
def test_levels_change_as_pils_do(name, argument, apply):
    for kind, image in pictures().items():
        difference = np.abs(
            apply(image, name, argument).astype(int) - with_pil(name, image, argument)
        )
        if apply is on_device:  # where the exact result is whole, rounding may cut off one more
            assert difference.max() <= 1 and difference.mean() < 0.01, kind
        else:
            assert difference.max() == 0, kind


@pytest.mark.parametrize("apply", [on_host, on_device])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "argument"),
    [("shear_x", 0.21), ("shear_y", 0.21), ("translate_x", 7.0), ("translate_y", 7.0),
     ("rotate", 21.0)],
)  # fmt: skip
def test_pixels_move_as_a_plain_loop_moves_them(name, argument, sign, apply):
    for image in pictures().values():
        expected = slow_move(image, name, sign * argument)
        difference = np.abs(apply(image, name, sign * argument) - expected)
        assert difference.max() <= 1 and difference.mean() < 0.3


def test_a_picture_smaller_than_the_translation_is_all_fill():
    image = np.zeros((9, 5, 3), np.uint8)
    assert (randaugment.translate_x(image, 7.0) == FILL).all()
    assert (randaugment.translate_y(image, -7.0)[:7] == FILL).all()


def test_the_device_does_what_the_host_does():
    # Smooth, so that equalized levels do not jump where a pixel differs by one.
    shapes = ((30, 41), (90, 35), (50, 50), (20, 20))
    rng = np.random.default_rng(1)
    host, device = HostRows(3, "randaugment", 24), DeviceRows(3, "randaugment", 24)
    rows, expected = [], []
    for pair in range(40):
        height, width = shapes[pair % 4]
        small = Image.fromarray(rng.integers(0, 256, (4, 3, 3)).astype(np.uint8))
        picture = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
        rows.append(device(picture, 0, pair))
        expected.append(host(picture, 0, pair)["image"])
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    images = jax.jit(functools.partial(device_augmentation.augment_batch, size=24))(batch)
    assert images.shape == (40, 24, 24, 3) and images.dtype == jnp.uint8
    difference = np.abs(np.asarray(images).astype(int) - np.stack(expected)).mean(axis=(1, 2, 3))
    assert np.median(difference) < 1 and difference.max() < 8

"""What training augmentation does to a picture: draws that are a function of (seed, epoch, pair).

The host draws; `image_preprocessing` (on the host) or `device_augmentation` (in the train step)
carries out what was drawn, so that both do the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

# The fractions of the area and the aspect ratios that a training crop may have (the paper's).
CROP_AREA = (0.5, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10

# RandAugment(2, 7) with these operations, each applied half of the time: the paper's. What moves
# pixels comes last; the device counts on it.
OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
)
OPERATIONS_PER_IMAGE = 2
OPERATION_PROBABILITY = 0.5
# At magnitude 7 of 10: factors of enhancement, tangents, pixels and degrees.
ARGUMENTS = {
    "brightness": 1.36,
    "sharpness": 1.36,
    "shear_x": 0.21,
    "shear_y": 0.21,
    "translate_x": 7.0,
    "translate_y": 7.0,
    "rotate": 21.0,
}
# Their arguments are as often negative.
SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# The colour of what moves into the picture from outside.
FILL = 128

Window = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to one picture, in this order.

    Attributes:
      window: top, left, height and width of the crop, in pixels of the picture.
      mirrored: whether left and right change places.
      operations: indices into `OPERATIONS`, one after the other.
      arguments: of the operations; 0 where one takes none.
    """

    window: Window
    mirrored: bool = False
    operations: tuple[int, ...] = (0,) * OPERATIONS_PER_IMAGE
    arguments: tuple[float, ...] = (0.0,) * OPERATIONS_PER_IMAGE


Draw = Callable[[np.random.Generator, int, int], Augmentation]


def draw_crop_flip(rng: np.random.Generator, height: int, width: int) -> Augmentation:
    """Draws a crop of a picture of `height` x `width` pixels and whether it is mirrored."""
    return Augmentation(draw_window(rng, height, width), bool(rng.random() < 0.5))


def draw_randaugment(rng: np.random.Generator, height: int, width: int) -> Augmentation:
    """Draws a crop, a mirroring and RandAugment's operations, the paper's augmentation."""
    cropped = draw_crop_flip(rng, height, width)
    operations, arguments = zip(
        *(draw_operation(rng) for _ in range(OPERATIONS_PER_IMAGE)), strict=True
    )
    return dataclasses.replace(cropped, operations=operations, arguments=arguments)


# Values of `config.data.augmentation`, beside none.
AUGMENTATIONS: dict[str, Draw] = {
    "crop_flip": draw_crop_flip,
    "randaugment": draw_randaugment,
}


def draw(
    augmentation: str, seed: int, epoch: int, pair: int, height: int, width: int
) -> Augmentation:
    """Returns what is done to the picture of a pair in an epoch.

    Args:
      augmentation: a key of `AUGMENTATIONS`.
      seed: of all draws.
      epoch: from 0.
      pair: index of the pair.
      height: of the picture, in pixels.
      width: of the picture, in pixels.
    """
    rng = np.random.default_rng((seed, epoch, pair))
    return AUGMENTATIONS[augmentation](rng, height, width)


def draw_window(rng: np.random.Generator, height: int, width: int) -> Window:
    """Returns top, left, height and width of a random crop, as torchvision's RandomResizedCrop.

    The first of ten draws of area and log-uniform aspect that fits; if none does, the largest
    central window whose aspect is allowed.
    """
    low, high = (math.log(aspect) for aspect in CROP_ASPECT)
    for _ in range(CROP_ATTEMPTS):
        area = height * width * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(low, high))
        crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 1 <= crop_height <= height and 1 <= crop_width <= width:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height = min(height, max(1, round(width / CROP_ASPECT[0])))
    crop_width = min(width, max(1, round(height * CROP_ASPECT[1])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def draw_operation(rng: np.random.Generator) -> tuple[int, float]:
    """Returns one of RandAugment's operations and its argument, or identity half of the time."""
    if rng.random() >= OPERATION_PROBABILITY:
        return 0, 0.0
    index = int(rng.integers(len(OPERATIONS)))
    name = OPERATIONS[index]
    argument = ARGUMENTS.get(name, 0.0)
    if name in SIGNED and rng.random() < 0.5:
        argument = -argument
    return index, argument

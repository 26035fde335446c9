"""What training augmentation does to an image, sampled as a function of (seed, epoch, pair).

Here it is only decided; `preprocessing.TrainingImages` carries it out.
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

# RandAugment(2, 7) with these operations, each applied half of the time: the paper's. Their
# arguments, at magnitude 7 of 10, are factors of enhancement, tangents, pixels and degrees.
ARGUMENTS = {
    "identity": 0.0,
    "autocontrast": 0.0,
    "equalize": 0.0,
    "brightness": 1.36,
    "sharpness": 1.36,
    "shear_x": 0.21,
    "shear_y": 0.21,
    "translate_x": 7.0,
    "translate_y": 7.0,
    "rotate": 21.0,
}
OPERATIONS = tuple(ARGUMENTS)
OPERATIONS_PER_IMAGE = 2
OPERATION_PROBABILITY = 0.5
# The arguments of these are as often negative.
SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# The colour of what moves into the image from outside.
FILL = 128

Window = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to one image, in this order.

    Attributes:
      window: The top, left, height and width of the crop, in pixels of the image.
      mirrored: Whether left and right change places.
      operations: Indices into `OPERATIONS`, which are applied one after the other.
      arguments: The arguments of the operations; 0 where one takes none.
    """

    window: Window
    mirrored: bool = False
    operations: tuple[int, ...] = (0,) * OPERATIONS_PER_IMAGE
    arguments: tuple[float, ...] = (0.0,) * OPERATIONS_PER_IMAGE


def sample_crop_flip(rng: np.random.Generator, height: int, width: int) -> Augmentation:
    """Returns a random crop of an image of `height` x `width` pixels, mirrored half of the time."""
    return Augmentation(sample_window(rng, height, width), bool(rng.random() < 0.5))


def sample_randaugment(rng: np.random.Generator, height: int, width: int) -> Augmentation:
    """Returns a crop, a mirroring and RandAugment's operations, the paper's augmentation."""
    cropped = sample_crop_flip(rng, height, width)
    operations, arguments = zip(
        *(sample_operation(rng) for _ in range(OPERATIONS_PER_IMAGE)), strict=True
    )
    return dataclasses.replace(cropped, operations=operations, arguments=arguments)


# The values of `config.data.augmentation`, beside "none".
AUGMENTATIONS: dict[str, Callable[[np.random.Generator, int, int], Augmentation]] = {
    "crop_flip": sample_crop_flip,
    "randaugment": sample_randaugment,
}


def sample(
    augmentation: str, seed: int, epoch: int, pair: int, height: int, width: int
) -> Augmentation:
    """Returns what is done to the image of a pair in an epoch, whose size is given in pixels.

    `augmentation` is a key of `AUGMENTATIONS`, and `seed` that of all augmentation.
    """
    rng = np.random.default_rng((seed, epoch, pair))
    return AUGMENTATIONS[augmentation](rng, height, width)


def sample_window(rng: np.random.Generator, height: int, width: int) -> Window:
    """Returns the top, left, height and width of a random crop, as torchvision's RandomResizedCrop.

    It is the first of ten samples of area and log-uniform aspect that fits; if none does, it is the
    largest central window whose aspect is allowed.
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


def sample_operation(rng: np.random.Generator) -> tuple[int, float]:
    """Returns the index of one of RandAugment's operations and its argument.

    Half of the time it is identity; otherwise all operations are equally likely, identity included.
    """
    if rng.random() >= OPERATION_PROBABILITY:
        return 0, 0.0
    index = int(rng.integers(len(OPERATIONS)))
    name = OPERATIONS[index]
    argument = ARGUMENTS[name]
    if name in SIGNED and rng.random() < 0.5:
        argument = -argument
    return index, argument

"""One picture as a row of a training batch, augmented on the host or ready for the device.

Rows are functions of (seed, epoch, pair) and the picture, whichever process or step makes them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fne_jax.data.images import preprocessing
from fne_jax.data.images.augmentation import OPERATIONS_PER_IMAGE, Augmentation, draw
from fne_jax.data.images.preprocessing import Picture

# A picture goes to the device on a square of this many times the size of what is made of it, shrunk
# only if it does not fit: 512 pixels for 384, and most sides of Flickr30K are 500.
DEVICE_MARGIN = 4 / 3

Row = dict[str, np.ndarray]
Signature = dict[str, tuple[tuple[int, ...], type]]


@dataclasses.dataclass(frozen=True)
class PlainRows:
    """Rows as evaluation sees the pictures: `image` [size, size, 3] uint8.

    Attributes:
      size: pixels of a side.
    """

    size: int

    @property
    def signature(self) -> Signature:
        """Shape and dtype of each array of a row."""
        return _pixels(self.size)

    def __call__(self, picture: Picture, epoch: int, pair: int) -> Row:
        """Returns the row of a pair; `picture` is a JPEG or [height, width, 3] uint8 pixels.

        Raises:
          ValueError: if the JPEG is damaged.
        """
        del epoch, pair
        return {"image": preprocessing.evaluation_image(picture, self.size)}


@dataclasses.dataclass(frozen=True)
class HostRows:
    """Rows that are augmented here: `image` [size, size, 3] uint8.

    Attributes:
      seed: of the draws.
      augmentation: a key of `augmentation.AUGMENTATIONS`.
      size: pixels of a side.
    """

    seed: int
    augmentation: str
    size: int

    @property
    def signature(self) -> Signature:
        """Shape and dtype of each array of a row."""
        return _pixels(self.size)

    def __call__(self, picture: Picture, epoch: int, pair: int) -> Row:
        """Returns the row of a pair; `picture` is a JPEG or [height, width, 3] uint8 pixels.

        Raises:
          ValueError: if the JPEG is damaged.
        """
        drawn = _drawn(self, picture, epoch, pair)
        image = preprocessing.crop(picture, drawn.window, self.size)
        return {"image": preprocessing.augmented(image, drawn)}


@dataclasses.dataclass(frozen=True)
class DeviceRows:
    """Whole pictures, and what `device_augmentation` is to do to them.

    `image` [side, side, 3] uint8, the picture in the upper left corner; `crop` [4] float32, top,
    left, height and width in its pixels; `mirrored` [] bool; `operations` [2] int32 and `arguments`
    [2] float32, see `augmentation.Augmentation`.

    Attributes:
      seed: of the draws.
      augmentation: a key of `augmentation.AUGMENTATIONS`.
      size: pixels of a side of what the device makes of it.
    """

    seed: int
    augmentation: str
    size: int

    @property
    def signature(self) -> Signature:
        """Shape and dtype of each array of a row."""
        return {
            **_pixels(self.side),
            "crop": ((4,), np.float32),
            "mirrored": ((), np.bool_),
            "operations": ((OPERATIONS_PER_IMAGE,), np.int32),
            "arguments": ((OPERATIONS_PER_IMAGE,), np.float32),
        }

    @property
    def side(self) -> int:
        """Pixels of a side of the squares sent."""
        return round(DEVICE_MARGIN * self.size)

    def __call__(self, picture: Picture, epoch: int, pair: int) -> Row:
        """Returns the row of a pair; `picture` is a JPEG or [height, width, 3] uint8 pixels.

        Raises:
          ValueError: if the JPEG is damaged.
        """
        drawn = _drawn(self, picture, epoch, pair)
        height, width = preprocessing.picture_shape(picture)
        image = preprocessing.fitted(picture, self.side)
        canvas = np.zeros((self.side, self.side, 3), np.uint8)
        canvas[: image.shape[0], : image.shape[1]] = image
        shrink = np.float32([image.shape[0] / height, image.shape[1] / width] * 2)
        return {
            "image": canvas,
            "crop": np.array(drawn.window, np.float32) * shrink,
            "mirrored": np.bool_(drawn.mirrored),
            "operations": np.array(drawn.operations, np.int32),
            "arguments": np.array(drawn.arguments, np.float32),
        }


def _pixels(side) -> Signature:
    return {"image": ((side, side, 3), np.uint8)}


RowMaker = PlainRows | HostRows | DeviceRows


def row_maker(augmentation: str, augment_on: str, seed: int, size: int) -> RowMaker:
    """Returns what makes rows of pictures.

    Args:
      augmentation: none, or a key of `augmentation.AUGMENTATIONS`.
      augment_on: host or device.
      seed: of the draws.
      size: pixels of a side of what the encoder takes.
    """
    if augmentation == "none":
        return PlainRows(size)
    return {"host": HostRows, "device": DeviceRows}[augment_on](seed, augmentation, size)


def _drawn(rows: HostRows | DeviceRows, picture: Picture, epoch: int, pair: int) -> Augmentation:
    shape = preprocessing.picture_shape(picture)
    return draw(rows.augmentation, rows.seed, epoch, pair, *shape)

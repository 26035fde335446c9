"""What tells a split from another, stored with a run as `data.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable

import numpy as np

from fne_jax.files import as_user_error

FILE_NAME = "data.json"


@dataclasses.dataclass(frozen=True)
class DatasetIdentity:
    """What tells a split, or a list of matches, from another.

    Attributes:
      pairs: The number of pairs.
      images: The number of images.
      checksum: 16 hexadecimal digits over the images, the captions, which belongs to which, and
        their ids. It says nothing of where the dataset lies or how it was prepared.
      image_checksum: 16 hexadecimal digits over which images there are, in whatever order: by their
        names, or where they are in memory, and have none, by their pixels. "" for a list.
    """

    pairs: int
    images: int
    checksum: str
    image_checksum: str = ""

    def __str__(self) -> str:
        images = self.image_checksum and f", of the images alone {self.image_checksum}"
        return f"{self.pairs} pairs of {self.images} images (checksum {self.checksum}{images})"


def checksum_of_set(contents: Iterable[bytes | np.ndarray]) -> str:
    """Returns 16 hexadecimal digits over contents in whatever order they come."""
    total = sum(int.from_bytes(hashlib.sha256(one).digest()[:8], "big") for one in contents)
    return f"{total % 2**64:016x}"


def read_identities(workdir: pathlib.Path) -> dict[str, DatasetIdentity]:
    """Returns the identity of each split of a run by name, and as `matches` that of its list.

    A run whose data nobody knows, such as one that `convert` made, has none.

    Raises:
      UserError: If the file is missing or damaged.
    """
    path = workdir / FILE_NAME
    with as_user_error(
        f"{path}: cannot be read", errors=(OSError, ValueError, TypeError, AttributeError)
    ):
        stored = json.loads(path.read_text())
        return {name: DatasetIdentity(**values) for name, values in stored.items()}

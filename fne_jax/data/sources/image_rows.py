"""Rows that name an image and some of its captions, gathered into images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from etils import epath

from fne_jax.data.sources.listing import ListedImage, is_text, same_file
from fne_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageRow:
    """One row or object of a listing.

    Attributes:
      where: The file and the place in it, for messages.
      image: The path of the image as listed, checked by `listing.checked_name`.
      captions: Captions of the image, unchecked.
      split: "train", "val" or "test".
      image_id: The listing's own id of the image, a number or text, or None.
    """

    where: str
    image: str
    captions: list[Any]
    split: str
    image_id: Any


def images_of_rows(rows: Iterable[ImageRow], folder: epath.Path) -> dict[str, list[ListedImage]]:
    """Returns the images of each split, in the order of their first rows.

    Rows of the same file make one image, however they spell its path. Images and captions are
    numbered in the rows' order.

    Args:
      rows: All rows of the listing.
      folder: The folder that relative paths start from.

    Raises:
      UserError: If an id is none, or rows disagree on an image's split or id.
    """
    files: dict[str, str] = {}  # by the paths as listed
    first: dict[str, ImageRow] = {}
    owner: dict[str, ImageRow] = {}  # the first row of each of the listing's own ids
    gathered: dict[str, tuple[list[Any], list[int]]] = {}
    number = 0
    for row in rows:
        file = files.get(row.image) or files.setdefault(row.image, same_file(folder / row.image))
        before = first.setdefault(file, row)
        for name in ("split", "image_id"):
            if getattr(row, name) != getattr(before, name):
                raise UserError(
                    f"{row.where}: {name} of {row.image!r} is {getattr(row, name)!r}, but "
                    f"{getattr(before, name)!r} in {before.where}"
                )
        if row.image_id is not None:
            if not is_text(row.image_id) and not isinstance(row.image_id, int | float):
                raise UserError(
                    f"{row.where}: image_id is {row.image_id!r:.60}; expected a number or text"
                )
            other = owner.setdefault(str(row.image_id), row)
            if files[other.image] != file:
                raise UserError(
                    f"{row.where}: the image_id {row.image_id!r} is also that of {other.image!r} "
                    f"in {other.where}"
                )
        captions, ids = gathered.setdefault(file, ([], []))
        captions.extend(row.captions)
        ids.extend(range(number, number + len(row.captions)))
        number += len(row.captions)
    splits: dict[str, list[ListedImage]] = {}
    for image_id, (file, row) in enumerate(first.items()):
        captions, ids = gathered[file]
        image = ListedImage(
            path=folder / row.image,
            where=row.where,
            image_id=image_id,
            source_id=row.image if row.image_id is None else str(row.image_id),
            captions=captions,
            caption_ids=ids,
        )
        splits.setdefault(row.split, []).append(image)
    return splits

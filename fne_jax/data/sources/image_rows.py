"""Rows that name an image and some of its captions, gathered into images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from etils import epath

from fne_jax.data.sources.listing import ListedImage
from fne_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageRow:
    """One row or object of a listing.

    Attributes:
      where: The file and the place in it, for messages.
      image: The path of the image as listed.
      captions: Captions of the image, unchecked.
      split: "train", "val" or "test".
      image_id: The listing's own id of the image, a number or text, or None.
    """

    where: str
    image: Any
    captions: list[Any]
    split: str
    image_id: Any


def images_of_rows(rows: Iterable[ImageRow], folder: epath.Path) -> dict[str, list[ListedImage]]:
    """Returns the images of each split, in the order of their first rows.

    Rows with the same path make one image. Images and captions are numbered in the rows' order.

    Args:
      rows: All rows of the listing.
      folder: The folder that relative paths start from.

    Raises:
      UserError: If a row names no image, or rows disagree on an image's split or id.
    """
    first: dict[str, ImageRow] = {}
    owner: dict[str, ImageRow] = {}  # the first row of each of the listing's own ids
    gathered: dict[str, tuple[list[Any], list[int]]] = {}
    number = 0
    for row in rows:
        if not isinstance(row.image, str) or not row.image:
            raise UserError(f"{row.where}: 'image' is {row.image!r:.60}; expected an image's path")
        before = first.setdefault(row.image, row)
        for name in ("split", "image_id"):
            if getattr(row, name) != getattr(before, name):
                raise UserError(
                    f"{row.where}: {name} of {row.image!r} is {getattr(row, name)!r}, but "
                    f"{getattr(before, name)!r} in {before.where}"
                )
        if row.image_id is not None:
            other = owner.setdefault(str(row.image_id), row)
            if other.image != row.image:
                raise UserError(
                    f"{row.where}: the image_id {row.image_id!r} is also that of {other.image!r} "
                    f"in {other.where}"
                )
        captions, ids = gathered.setdefault(row.image, ([], []))
        captions.extend(row.captions)
        ids.extend(range(number, number + len(row.captions)))
        number += len(row.captions)
    splits: dict[str, list[ListedImage]] = {}
    for image_id, (name, row) in enumerate(first.items()):
        captions, ids = gathered[name]
        image = ListedImage(
            path=folder / name,
            where=row.where,
            image_id=image_id,
            source_id=name if row.image_id is None else str(row.image_id),
            captions=captions,
            caption_ids=ids,
        )
        splits.setdefault(row.split, []).append(image)
    return splits

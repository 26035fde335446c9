"""Rows that name a picture and its captions, gathered into images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from etils import epath

from fne_jax.data.sources.listing import SourceImage
from fne_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageRow:
    """One row or object of a listing.

    Attributes:
      where: file and place, for messages.
      image: the picture's path as listed.
      captions: of the picture, unchecked.
      split: train, val or test.
      image_id: the listing's own id of the picture, a number or text, or None.
    """

    where: str
    image: Any
    captions: list[Any]
    split: str
    image_id: Any


def images_of_rows(rows: Iterable[ImageRow], pictures: epath.Path) -> dict[str, list[SourceImage]]:
    """Returns the images of each split, in the order of their first rows.

    Rows of one picture make one image. Images and captions are numbered in the rows' order.

    Args:
      rows: of the whole listing.
      pictures: folder that relative paths start from.

    Raises:
      UserError: if a row names no picture, or rows disagree on a picture's split or id.
    """
    first: dict[str, ImageRow] = {}
    owner: dict[str, ImageRow] = {}  # the first row of each of the listing's own ids
    gathered: dict[str, tuple[list[Any], list[int]]] = {}
    number = 0
    for row in rows:
        if not isinstance(row.image, str) or not row.image:
            raise UserError(f"{row.where}: 'image' is {row.image!r:.60}; expected a picture's path")
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
    splits: dict[str, list[SourceImage]] = {}
    for image_id, (name, row) in enumerate(first.items()):
        captions, ids = gathered[name]
        image = SourceImage(
            path=pictures / name,
            where=row.where,
            image_id=image_id,
            source_id=name if row.image_id is None else str(row.image_id),
            captions=captions,
            caption_ids=ids,
        )
        splits.setdefault(row.split, []).append(image)
    return splits

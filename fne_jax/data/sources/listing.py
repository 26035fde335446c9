"""What every listing of captioned images is read into, and the checks that all of them share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from fne_jax.data.pairs import SPLITS
from fne_jax.errors import UserError

# COCO's `restval` images belong to the training split of the published protocol.
SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}
# Far above the longest captions of Flickr30K and COCO: a longer text is a file read wrongly, such
# as a table with an unclosed quotation mark.
MAX_CAPTION_CHARACTERS = 2000


@dataclasses.dataclass(frozen=True)
class ListedImage:
    """One image as its source lists it, nothing of it checked yet.

    Attributes:
      path: The file of the image.
      where: The entry in the source, for messages.
      image_id: The id of the image, unique over the dataset.
      source_id: The name or number by which the source itself knows the image.
      captions: What stands where captions should.
      caption_ids: One number for each caption.
    """

    path: epath.Path
    where: str
    image_id: int
    source_id: str
    captions: Sequence[Any]
    caption_ids: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An image or a caption that cannot be used.

    Attributes:
      where: The entry in the source.
      image: The path of the image.
      reason: Why it cannot be used.
    """

    where: str
    image: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """A dataset as its files list it.

    Attributes:
      name: The name of the dataset, part of the name of the prepared one.
      digest: The digest of the files that list it; another digest is another dataset.
      splits: The images of train, val and test, in the source's order.
    """

    name: str
    digest: str
    splits: dict[str, list[ListedImage]]

    def images(self) -> list[ListedImage]:
        """Returns all images, those of train first, then val and test."""
        return [image for split in SPLITS for image in self.splits[split]]


def existing_folder(data_dir: str, expected: str) -> epath.Path:
    """Returns `config.data.dir` as a path.

    Args:
      data_dir: The value of `config.data.dir`.
      expected: What the folder should hold, for the message.

    Raises:
      UserError: If it is not a folder.
    """
    folder = epath.Path(data_dir).expanduser()
    if not data_dir or not folder.is_dir():
        raise UserError(
            f"config.data.dir is {data_dir!r}, which is not a folder; point it at the folder that "
            f"holds {expected}"
        )
    return folder


def one_file(folder: epath.Path, pattern: str, kind: str) -> epath.Path:
    """Returns the one file of a folder that matches a pattern.

    Raises:
      UserError: If there is none, or more than one.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: expected one {pattern} ({kind}), found {names}")
    return found[0]


def image_folder(folder: epath.Path) -> epath.Path:
    """Returns the folder `images` of a dataset's folder, or that itself where there is none."""
    images = folder / "images"
    return images if images.is_dir() else folder


def read_json(path: epath.Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
      UserError: If it is not one.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of UTF-8 or of JSON
        raise UserError(f"{path}: not a JSON file: {error}") from error


def digest_of(paths: Sequence[epath.Path]) -> str:
    """Returns 12 hexadecimal digits that stand for the content of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_listing(where: str, splits: dict[str, list[ListedImage]], advice: str = "") -> None:
    """Checks that all splits have images, and that image ids are unique and fit the records.

    Args:
      where: The listing, for messages.
      splits: The images of each split that the listing names.
      advice: What to do about a missing split.

    Raises:
      UserError: If something is wrong; it names the split, or the two entries of one id.
    """
    for split in SPLITS:
        if not splits.get(split):
            raise UserError(f"{where}: no image of the split {split!r}{advice}")
    entry_of: dict[int, ListedImage] = {}
    limit = np.iinfo(np.int32)
    for split in SPLITS:
        for image in splits[split]:
            fits = isinstance(image.image_id, int) and 0 <= image.image_id <= limit.max
            if not fits:
                raise UserError(
                    f"{image.where}: the image id is {image.image_id!r}; expected a whole number "
                    f"from 0 to {limit.max}"
                )
            other = entry_of.setdefault(image.image_id, image)
            if other is not image:
                raise UserError(
                    f"{image.where}: the image id {image.image_id} is also that of {other.where}; "
                    "ids must be unique over all splits"
                )
            for caption_id in image.caption_ids:
                if not isinstance(caption_id, int):
                    raise UserError(
                        f"{image.where}: the id of a caption is {caption_id!r}; expected a whole "
                        "number"
                    )


def usable_captions(image: ListedImage) -> tuple[list[str], list[int], list[Skipped]]:
    """Returns the captions that can be used, their ids, and the others with their reasons."""
    captions, ids, skipped = [], [], []
    for number, (caption, caption_id) in enumerate(
        zip(image.captions, image.caption_ids, strict=True)
    ):
        reason = _caption_fault(caption)
        if reason:
            where = f"{image.where}, caption {number}"
            skipped.append(Skipped(where, str(image.path), reason))
        else:
            captions.append(caption)
            ids.append(caption_id)
    return captions, ids, skipped


def _caption_fault(caption):
    if not isinstance(caption, str):
        return f"the caption is not text: {caption!r:.60}"
    if not caption.strip(string.whitespace + string.punctuation):
        return f"the caption is empty: {caption!r:.60}"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return (
            f"the caption is too long: {len(caption)} characters, more than the "
            f"{MAX_CAPTION_CHARACTERS} of a plausible one; it begins {caption[:40]!r}"
        )
    try:
        caption.encode()
    except UnicodeEncodeError:
        return f"the caption is not text: half a character in {caption!r:.60}"
    return ""

"""`json_lists`: the lists in which the paper's authors, and ALBEF before them, keep their data.

A list for training has one object a caption, `{"image", "caption", "image_id"}`; those for
validation and test one an image, `{"image", "caption": [...]}`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

from etils import epath

from fne_jax.data.pairs import SPLITS
from fne_jax.data.sources import listing
from fne_jax.data.sources.listing import ListedImage, Listing
from fne_jax.errors import UserError


def read_listing(data_dir: str) -> Listing:
    """Returns the dataset of a folder with one list each for train, val and test.

    A list is found by the split in its name, e.g. `flickr30k_train.json`. Images lie in the folder
    `images` beside the lists, or beside the lists themselves. Raises UserError, naming file and
    entry, if something is missing or of the wrong kind.
    """
    folder = listing.existing_folder(
        data_dir, "the authors' lists *train*.json, *val*.json and *test*.json, and images/"
    )
    paths = [
        listing.one_file(folder, [f"*{split}*.json"], "the authors' lists") for split in SPLITS
    ]
    file_of = functools.cache(listing.image_folder(folder).__truediv__)
    rows = itertools.chain(
        *(_rows(path, split, file_of) for split, path in zip(SPLITS, paths, strict=True))
    )
    return listing.checked_listing("json_lists", str(folder), paths, listing.images_of_rows(rows))


def _rows(path: epath.Path, split: str, file_of: Callable[[str], epath.Path]):
    entries = listing.read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of objects with 'image' and 'caption'")
    for index, entry in enumerate(entries):
        where = f"{path}: [{index}]"
        for key in ("image", "caption"):
            if not isinstance(entry, dict) or key not in entry:
                raise UserError(f"{where}: the key {key!r} is missing (the authors' lists)")
        name, captions = listing.checked_name(where, "image", entry["image"]), entry["caption"]
        yield ListedImage(
            split=split,
            path=file_of(name),
            where=where,
            image_id=entry.get("image_id"),
            source_id=name,
            captions=captions if isinstance(captions, list) else [captions],
        )

"""`coco_captions`: COCO's own `captions_*.json`, and data of others in that format."""

from __future__ import annotations

import re
from typing import Any

from etils import epath

from fne_jax.data.sources import listing
from fne_jax.data.sources.listing import ListedImage, Listing
from fne_jax.data.sources.pair_tables import half_of_name
from fne_jax.errors import UserError


def read_listing(data_dir: str) -> Listing:
    """Returns the images and captions of all `captions_*.json` of a folder, with COCO's own ids.

    They lie in the folder or in `annotations`; the images of `captions_val2017.json` in `val2017`,
    or in `images`. Names with "train" make the training split. Of those with "val" each image goes
    to val or test, half of them to either, by a hash of its name, unless there is one with "test".
    Raises UserError, naming file and entry, if something is missing or of the wrong kind.
    """
    folder = listing.existing_folder(data_dir, "captions_train*.json and captions_val*.json")
    inside = folder / "annotations"
    below = (inside if inside.is_dir() else folder).iterdir()
    paths = sorted(path for path in below if path.match("captions_*.json"))
    if not paths:
        raise UserError(f"config.data.dir is {data_dir!r}: there is no captions_*.json in it")
    has_test = any("test" in path.name for path in paths)
    images = [image for path in paths for image in _images(path, folder, has_test)]
    return listing.checked_listing("coco_captions", str(folder), paths, images)


def _images(path: epath.Path, folder: epath.Path, has_test: bool) -> list[ListedImage]:
    content = listing.read_json(path)
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: the key {key!r} is missing (COCO's captions)")
    captions: dict[Any, list[dict[str, Any]]] = {}
    for index, entry in enumerate(content["annotations"]):
        _check(f"{path}: annotations[{index}]", entry, ("image_id", "id", "caption"))
        captions.setdefault(entry["image_id"], []).append(entry)
    year = re.sub(r"^captions_|\.json$", "", path.name)
    below = folder / year if (folder / year).is_dir() else listing.image_folder(folder)
    images = []
    for index, entry in enumerate(content["images"]):
        where = f"{path}: images[{index}]"
        _check(where, entry, ("id", "file_name"))
        name = listing.checked_name(where, "file_name", entry["file_name"])
        of_image = captions.pop(entry["id"], [])
        images.append(
            ListedImage(
                split=_split(path.name, name, has_test),
                path=below / name,
                where=where,
                image_id=entry["id"],
                source_id=str(entry["id"]),
                captions=[one["caption"] for one in of_image],
                caption_ids=[one["id"] for one in of_image],
            )
        )
    if captions:
        raise UserError(
            f"{path}: {len(captions)} images have captions and are not listed, first "
            f"{next(iter(captions))!r:.60}"
        )
    return images


def _split(file_name: str, image_name: str, has_test: bool) -> str:
    for split in ("train", "test"):
        if split in file_name:
            return split
    return "val" if has_test else half_of_name(image_name)


def _check(where: str, entry: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        if not isinstance(entry, dict) or key not in entry:
            raise UserError(f"{where}: the key {key!r} is missing (COCO's captions)")
        if isinstance(entry[key], list | dict):
            raise UserError(f"{where}: {key!r} is {entry[key]!r:.60}; expected a number or text")

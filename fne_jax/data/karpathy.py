"""Datasets in Karpathy's JSON layout, in which Flickr8K, Flickr30K and COCO are distributed.

A file `dataset_<name>.json` holds `images`, each with `filename`, optionally `filepath` (a folder),
`split`, and `sentences` with a `raw` caption each (Karpathy and Fei-Fei, CVPR 2015).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from fne_jax.data.pair_builder import PairBuilder
from fne_jax.errors import UserError

# COCO's `restval` images belong to the training split of the published protocol.
SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}
JPEG_QUALITY = 95  # of pictures that had to be converted


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One image of a Karpathy file.

    Attributes:
      path: the picture.
      image_id: its id in the source (COCO's `cocoid`), or its place in the file.
      captions: the raw captions.
      caption_ids: the captions' `sentid`s.
    """

    path: pathlib.Path
    image_id: int
    captions: list[str]
    caption_ids: list[int]


def find_json(data_dir: str) -> pathlib.Path:
    """Returns the one `dataset*.json` of a folder.

    Raises:
      UserError: if the folder is not there, or does not hold exactly one such file.
    """
    folder = pathlib.Path(data_dir)
    if not data_dir or not folder.is_dir():
        raise UserError(
            f"config.data.dir is {data_dir!r}, which is not a folder; point it at the folder that "
            "holds dataset_<name>.json and images/"
        )
    found = sorted(folder.glob("dataset*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: expected one dataset*.json (Karpathy's layout), found {names}")
    return found[0]


def read_karpathy(json_path: pathlib.Path) -> dict[str, list[ImageRecord]]:
    """Returns the images of each split, in the file's order.

    Raises:
      UserError: naming the file and the entry, if the file is not JSON, a key is missing, a
        picture is not there, or an image has no caption.
    """
    try:
        images = json.loads(json_path.read_text("utf-8"))["images"]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{json_path}: not a JSON file: {error}") from error
    except (KeyError, TypeError):
        raise UserError(f"{json_path}: the key 'images' is missing (Karpathy's layout)") from None
    splits: dict[str, list[ImageRecord]] = {}
    for index, entry in enumerate(images):
        split, record = _read_entry(json_path, index, entry)
        splits.setdefault(split, []).append(record)
    for split in ("train", "val", "test"):
        if split not in splits:
            raise UserError(f"{json_path}: no image of the split {split!r}")
    return splits


def _read_entry(json_path, index, entry):
    where = f"{json_path}: images[{index}]"
    for key in ("filename", "split", "sentences"):
        if key not in entry:
            raise UserError(f"{where}: the key {key!r} is missing (Karpathy's layout)")
    if entry["split"] not in SPLIT_OF:
        raise UserError(
            f"{where}: split is {entry['split']!r}; expected one of {', '.join(SPLIT_OF)}"
        )
    path = json_path.parent / "images" / entry.get("filepath", "") / entry["filename"]
    if not path.is_file():
        raise UserError(f"{where}: there is no picture {path}")
    if not entry["sentences"]:
        raise UserError(f"{where} ({entry['filename']}): the list of captions is empty")
    for number, sentence in enumerate(entry["sentences"]):
        if not isinstance(sentence.get("raw"), str):
            raise UserError(f"{where}: sentences[{number}]: the text 'raw' is missing")
    record = ImageRecord(
        path=path,
        image_id=entry.get("cocoid", entry.get("imgid", index)),
        captions=[sentence["raw"] for sentence in entry["sentences"]],
        caption_ids=[sentence.get("sentid", -1) for sentence in entry["sentences"]],
    )
    return SPLIT_OF[entry["split"]], record


@dataclasses.dataclass(kw_only=True)
class KarpathyConfig(tfds.core.BuilderConfig):
    """Where the source lies; a changed JSON file is another dataset.

    Attributes:
      json_path: the Karpathy file, beside a folder `images`.
    """

    json_path: pathlib.Path
    name: str = dataclasses.field(init=False)

    def __post_init__(self):
        digest = hashlib.sha256(self.json_path.read_bytes()).hexdigest()[:12]
        self.name = f"{self.json_path.stem.removeprefix('dataset_')}-{digest}"


class Karpathy(PairBuilder, skip_registration=True):
    """Packs the pictures of a Karpathy file, as they are, with their captions."""

    name = "karpathy"
    builder_config: KarpathyConfig

    def splits(self) -> list[str]:
        """Returns the file's splits, `restval` counted as train."""
        return list(self._images())

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the records of a split in the file's order."""
        for record in self._images()[split]:
            yield {
                "image": io.BytesIO(_jpeg_bytes(record.path)),
                "image_id": record.image_id,
                "captions": record.captions,
                "caption_ids": record.caption_ids,
            }

    def _images(self):
        return read_karpathy(self.builder_config.json_path)


def _jpeg_bytes(path):
    """Returns a picture's bytes as they are if it is an RGB JPEG, else converted to one."""
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.format == "JPEG" and picture.mode == "RGB":
                return content
            stream = io.BytesIO()
            picture.convert("RGB").save(stream, "JPEG", quality=JPEG_QUALITY)
            return stream.getvalue()
    except OSError as error:
        raise UserError(f"{path}: not a picture that can be read: {error}") from error

"""All sources of captioned images by the names that `config.data.source` takes.

To add one, write its file in this folder and give it an entry in `SOURCES`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from fne_jax import files
from fne_jax.data.pairs import SPLITS, PairDataset
from fne_jax.data.sources import (
    coco_captions,
    json_lists,
    karpathy,
    many_files,
    npz,
    pair_tables,
    parquet,
    shapes,
    synthetic,
    text_files,
    tfds_datasets,
    webdataset,
)
from fne_jax.data.sources.listing import Listing
from fne_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of captioned images; it has one of the functions.

    Attributes:
      in_dir: What lies in `config.data.dir`, for docs/data.md.
      read: Returns the listing that `config.data` describes, whose images are prepared before use.
      fields: The fields of `config.data` that tell what is listed.
      files: Returns the files that `config.data` names, where these are looked for at each start.
      load: Returns a split where there is nothing to prepare, from `config.data`, the
        pixels of a side, and the name of the split.
    """

    in_dir: str
    read: Callable[[ml_collections.ConfigDict], Listing] | None = None
    fields: tuple[str, ...] = ("dir",)
    files: Callable[[ml_collections.ConfigDict], list[str]] | None = None
    load: Callable[[ml_collections.ConfigDict, int, str], PairDataset] | None = None


def find_source(name: str) -> Source:
    """Returns the source of a name; raises UserError, which lists the names, if there is none."""
    if name not in SOURCES:
        raise UserError(f"config.data.source is {name!r}; expected one of {', '.join(SOURCES)}")
    return SOURCES[name]


def load_split(data: ml_collections.ConfigDict, image_size: int, split: str) -> PairDataset:
    """Returns a split of the dataset that `config.data` describes, preparing it if need be.

    `image_size` are the pixels of a side that the encoder takes. Raises UserError if the split or
    the source is unknown, or the source cannot be read.
    """
    return load_splits(data, image_size, [split])[0]


def load_splits(
    data: ml_collections.ConfigDict, image_size: int, splits: Sequence[str] = SPLITS
) -> list[PairDataset]:
    """Returns splits as `load_split` does, with one look at what was prepared."""
    # Kept out of the module's imports: it imports this one.
    from fne_jax.data.preparation import preparing

    prepared: dict[tuple[str, str], Any] = {}
    loaded = []
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"the split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
        of_split = data_of(data, split)
        load = find_source(of_split.source).load
        if load is not None:
            loaded.append(load(of_split, image_size, split))
            continue
        place = of_split.source, of_split.dir
        if place not in prepared:
            prepared[place] = preparing.prepare(of_split)
        loaded.append(prepared[place].load_split(split))
    return loaded


def data_of(data: ml_collections.ConfigDict, split: str) -> ml_collections.ConfigDict:
    """Returns the group `config.data` of a split, which `data.val` and `data.test` may change."""
    other = {"val": data.val, "test": data.test}.get(split, "")
    if not other:
        return data
    of_split = ml_collections.ConfigDict(data.to_dict())
    of_split.source, of_split.dir = other.split(":", 1)
    return of_split


def _opened(data: ml_collections.ConfigDict, image_size: int, split: str) -> PairDataset:
    # Kept out of the module's imports: it needs pyarrow.
    from fne_jax.data.preparation.storage import ABOUT_FILE, Prepared

    del image_size
    folder = files.local_folder(data.dir, "config.data.dir")
    if not (folder / ABOUT_FILE).exists():
        raise UserError(f"config.data.dir={folder}: expected a folder that `prepare` has printed")
    return Prepared.open(folder).load_split(split)


def _lists(*patterns: str) -> Callable[[ml_collections.ConfigDict], list[str]]:
    """Returns what finds the files of such names that list images, all of which count."""

    def found(data):
        folder = pathlib.Path(files.expand_home(data.dir))
        places = [one for one in (folder, folder / "annotations") if one.is_dir()]
        below = [path for one in places for path in one.iterdir()]
        return sorted(str(path) for path in below if any(map(path.match, patterns)))

    return found


_NAMED_KARPATHY = "`dataset_<source>.json` (Karpathy's splits) and the images in `images/`"
_TABLE = "one table of pairs (or `dir` is the table itself)"

SOURCES: dict[str, Source] = {
    **{
        name: Source(_NAMED_KARPATHY, lambda data, name=name: karpathy.read_listing(data.dir, name))
        for name in karpathy.IMAGES_FROM
    },
    "karpathy": Source(
        "any one `dataset_*.json` of that layout, and `images/`",
        lambda data: karpathy.read_listing(data.dir),
        files=_lists("dataset*.json"),
    ),
    "json_lists": Source(
        "the authors' lists `*train*.json`, `*val*.json`, `*test*.json`, and `images/`",
        lambda data: json_lists.read_listing(data.dir),
        files=_lists("*.json"),
    ),
    "csv": Source(
        _TABLE,
        lambda data: pair_tables.read_listing(data.dir, "csv"),
        files=_lists("*.csv", "*.tsv"),
    ),
    "jsonl": Source(
        _TABLE, lambda data: pair_tables.read_listing(data.dir, "jsonl"), files=_lists("*.jsonl")
    ),
    "shapes": Source(
        "nothing: rendered", lambda data: shapes.read_listing(data.shapes), fields=("shapes",)
    ),
    "coco_captions": Source(
        "COCO's own `annotations/captions_*.json`, and images in `train2017/`, `val2017/`",
        lambda data: coco_captions.read_listing(data.dir),
        files=_lists("captions_*.json"),
    ),
    "text_files": Source(
        "images, each with a `.txt` of its name beside it",
        lambda data: text_files.read_listing(data.dir),
        files=lambda data: many_files.named_by(data.dir, text_files.ENDINGS),
    ),
    "webdataset": Source(
        "tars of images and `.txt` or `.json`, or `dir` is a pattern of them",
        webdataset.read_listing,
        ("dir", "caption_key"),
        lambda data: many_files.named_by(data.dir, webdataset.ENDINGS),
    ),
    "parquet": Source(
        "tables with the images in them, or `dir` is a pattern of them",
        parquet.read_listing,
        ("dir", "image_key", "caption_key"),
        lambda data: many_files.named_by(data.dir, parquet.ENDINGS),
    ),
    "tfds": Source(
        "a dataset of TensorFlow Datasets: its folder, or `dir` is its name",
        tfds_datasets.read_listing,
        ("dir", "image_key", "caption_key"),
    ),
    "prepared": Source("what `prepare` wrote: the folder that it printed, or a copy", load=_opened),
    "npz": Source(
        "`train.npz`, `val.npz`, `test.npz` with `images` (uint8), `captions`, `caption_image`",
        load=npz.load_split,
    ),
    "synthetic": Source(
        "nothing: made up in memory, to test a machine without TensorFlow",
        load=synthetic.load_split,
    ),
}

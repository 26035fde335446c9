"""All sources of captioned images by the names that `config.data.source` takes.

To add one, write its file in this folder and give it an entry in `SOURCES`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import ml_collections
from etils import epath

from fne_jax.data.pairs import SPLITS, PairDataset
from fne_jax.data.sources import json_lists, karpathy, npz, pair_tables, synthetic
from fne_jax.data.sources.listing import Listing
from fne_jax.errors import UserError

if TYPE_CHECKING:
    from fne_jax.data.preparation.storage import PairBuilder


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of captioned images; it has one of the functions.

    Attributes:
      in_dir: What lies in `config.data.dir`, for docs/data.md.
      read: Reads the listing at `config.data.dir`, whose images are checked and packed before use.
      builder: Returns what renders images and packs them before use, from `config.data` and the
        folder of prepared datasets.
      load: Returns a split as arrays, so that there is nothing to prepare, from `config.data`, the
        pixels of a side, and the name of the split.
    """

    in_dir: str
    read: Callable[[str], Listing] | None = None
    builder: Callable[[ml_collections.ConfigDict, epath.Path], PairBuilder] | None = None
    load: Callable[[ml_collections.ConfigDict, int, str], PairDataset] | None = None


def find_source(name: str) -> Source:
    """Returns the source of a name.

    Raises:
      UserError: If there is none; it lists the names.
    """
    if name not in SOURCES:
        raise UserError(f"config.data.source is {name!r}; expected one of {', '.join(SOURCES)}")
    return SOURCES[name]


def load_split(data: ml_collections.ConfigDict, image_size: int, split: str) -> PairDataset:
    """Returns a split of the dataset that `config.data` describes, preparing it if need be.

    Args:
      data: The group `config.data` of configs/base.py.
      image_size: The pixels of a side that the encoder takes.
      split: "train", "val" or "test".

    Raises:
      UserError: If the split or the source is unknown, or the source cannot be read.
    """
    if split not in SPLITS:
        raise UserError(f"the split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
    load = find_source(data.source).load
    if load is not None:
        return load(data, image_size, split)
    # Kept out of the module's imports: training from arrays must work without TensorFlow.
    from fne_jax.data.preparation import captioned_images

    return captioned_images.prepared_builder(data).load_split(split)


def _shapes_builder(data: ml_collections.ConfigDict, cache: epath.Path) -> PairBuilder:
    # Kept out of the module's imports: it needs TensorFlow Datasets.
    from fne_jax.data.sources import shapes

    return shapes.shapes_builder(data.shapes, cache)


_NAMED_KARPATHY = "`dataset_<source>.json` (Karpathy's splits) and the images in `images/`"
_TABLE = "one table of pairs (or `dir` is the table itself)"

SOURCES: dict[str, Source] = {
    **{
        name: Source(_NAMED_KARPATHY, functools.partial(karpathy.read_listing, name=name))
        for name in karpathy.IMAGES_FROM
    },
    "karpathy": Source(
        "any one `dataset_*.json` of that layout, and `images/`", karpathy.read_listing
    ),
    "json_lists": Source(
        "the authors' lists `*train*.json`, `*val*.json`, `*test*.json`, and `images/`",
        json_lists.read_listing,
    ),
    "csv": Source(_TABLE, functools.partial(pair_tables.read_listing, kind="csv")),
    "jsonl": Source(_TABLE, functools.partial(pair_tables.read_listing, kind="jsonl")),
    "shapes": Source("nothing: rendered", builder=_shapes_builder),
    "npz": Source(
        "`train.npz`, `val.npz`, `test.npz` with `images` (uint8), `captions`, `caption_image`",
        load=npz.load_split,
    ),
    "synthetic": Source(
        "nothing: made up in memory, to exercise a machine without TensorFlow",
        load=synthetic.load_split,
    ),
}

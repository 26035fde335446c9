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

from fne_jax.data.pairs import PairDataset
from fne_jax.data.sources import json_lists, karpathy, npz, pair_tables, synthetic
from fne_jax.data.sources.listing import Listing
from fne_jax.errors import UserError

if TYPE_CHECKING:
    from fne_jax.data.preparation.pair_builder import PairBuilder


@dataclasses.dataclass(frozen=True)
class Listed:
    """A source whose files list images and captions; it is checked and packed before use.

    Attributes:
      in_dir: What lies in `config.data.dir`, for docs/data.md.
      read: Reads the listing at `config.data.dir`.
    """

    in_dir: str
    read: Callable[[str], Listing]


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A source whose splits are arrays; there is nothing to prepare.

    Attributes:
      in_dir: What lies in `config.data.dir`, for docs/data.md.
      load: Returns a split from `config.data`, the pixels of a side, and the name of the split.
    """

    in_dir: str
    load: Callable[[ml_collections.ConfigDict, int, str], PairDataset]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A source that makes its images itself; they are packed before use.

    Attributes:
      in_dir: What lies in `config.data.dir`, for docs/data.md.
      builder: Returns what packs the dataset, from `config.data` and the folder of prepared
        datasets.
    """

    in_dir: str
    builder: Callable[[ml_collections.ConfigDict, epath.Path], PairBuilder]


Source = Listed | InMemory | Rendered


def find_source(name: str) -> Source:
    """Returns the source of a name.

    Raises:
      UserError: If there is none; it lists the names.
    """
    if name not in SOURCES:
        raise UserError(f"config.data.source is {name!r}; expected one of {', '.join(SOURCES)}")
    return SOURCES[name]


def _shapes_builder(data: ml_collections.ConfigDict, cache: epath.Path) -> PairBuilder:
    # Kept out of the module's imports: it needs TensorFlow Datasets.
    from fne_jax.data.sources import shapes

    return shapes.shapes_builder(data.shapes, cache)


_NAMED_KARPATHY = "`dataset_<source>.json` (Karpathy's splits) and the images in `images/`"
_TABLE = "one table of pairs (or `dir` is the table itself)"

SOURCES: dict[str, Source] = {
    **{
        name: Listed(_NAMED_KARPATHY, functools.partial(karpathy.read_listing, name=name))
        for name in karpathy.IMAGES_FROM
    },
    "karpathy": Listed(
        "any one `dataset_*.json` of that layout, and `images/`", karpathy.read_listing
    ),
    "json_lists": Listed(
        "the authors' lists `*train*.json`, `*val*.json`, `*test*.json`, and `images/`",
        json_lists.read_listing,
    ),
    "csv": Listed(_TABLE, functools.partial(pair_tables.read_listing, kind="csv")),
    "jsonl": Listed(_TABLE, functools.partial(pair_tables.read_listing, kind="jsonl")),
    "shapes": Rendered("nothing: rendered", _shapes_builder),
    "npz": InMemory(
        "`train.npz`, `val.npz`, `test.npz` with `images` (uint8), `captions`, `caption_image`",
        npz.load_split,
    ),
    "synthetic": InMemory(
        "nothing: made up in memory, to exercise a machine without TensorFlow",
        synthetic.load_split,
    ),
}

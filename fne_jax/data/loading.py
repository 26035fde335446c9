"""Loading a split of the dataset that a config describes."""

from __future__ import annotations

import ml_collections

from fne_jax.data.pairs import SPLITS, PairDataset
from fne_jax.data.sources.registry import InMemory, find_source
from fne_jax.errors import UserError


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
    source = find_source(data.source)
    if isinstance(source, InMemory):
        return source.load(data, image_size, split)
    # Kept out of the module's imports: training from arrays must work without TensorFlow.
    from fne_jax.data.preparation import prepared_datasets

    return prepared_datasets.prepared_split(prepared_datasets.prepared_builder(data), split)

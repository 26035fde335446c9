"""The TFDS record that every dataset of images with captions is prepared into."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class PairBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes one record an image, in the source's order, one shard a split.

    TFDS shuffles by default, which would lose COCO's folds of consecutive images; shard-based
    builders keep the order that `records` yields.
    """

    VERSION = tfds.core.Version("1.0.0")

    @abc.abstractmethod
    def splits(self) -> list[str]:
        """Returns the names of the splits."""

    @abc.abstractmethod
    def records(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the records of a split: the features of `_info`."""

    def extra_features(self) -> dict[str, Any]:
        """Returns features that only this dataset has."""
        return {}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "image_id": tfds.features.Scalar(np.int64),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "caption_ids": tfds.features.Sequence(tfds.features.Scalar(np.int64)),
                    **self.extra_features(),
                }
            ),
        )

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager

        def numbered(split):
            return lambda: enumerate(self.records(split))

        return {split: [numbered(split)] for split in self.splits()}


def prepare(builder: PairBuilder) -> None:
    """Writes the dataset unless a whole one is there; TFDS renames it into place when done."""
    builder.download_and_prepare(file_format="array_record")

"""The TFDS record that every dataset of images with captions is prepared into."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from fne_jax.data.pairs import KnownTruth

SUMMARY_FILE = "prepared.json"
# 2.6 GB of COCO's images.
IMAGES_PER_SHARD = 16_384


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """What a split holds.

    Attributes:
      images: The number of images.
      captions: The number of captions.
      checksum: 16 hexadecimal digits over JPEGs, captions and ids in their order. It says nothing
        of how the dataset was built, so the same source gives the same on any machine.
    """

    images: int
    captions: int
    checksum: str


def summarize(records: Iterable[dict[str, Any]]) -> SplitSummary:
    """Returns the summary of the records that a `PairBuilder` yields or has written."""
    summary = _RunningSummary()
    for record in records:
        summary.add(record)
    return summary.value()


class PairBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes one record an image, in the source's order.

    TFDS shuffles by default, which would lose COCO's folds of consecutive images; shard-based
    builders keep the order that `records` yields.
    """

    VERSION = tfds.core.Version("1.0.0")

    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """Returns the number of images of each split."""

    @abc.abstractmethod
    def records(self, split: str, rows: range) -> Iterator[dict[str, Any]]:
        """Yields consecutive records of a split: the features of `_info`, `image` as bytes.

        It is called for one range after the other, in order.
        """

    def extra_features(self) -> dict[str, Any]:
        """Returns the features that only this dataset has."""
        return {}

    def known_truth(self, extras: list[dict[str, Any]]) -> KnownTruth | None:
        """Returns the truth of a split from the extra features of its records, if it is known."""
        del extras
        return None

    def source_file(self, split: str, index: int) -> str:
        """Returns the file that a record of the prepared dataset was made of, "" if there is none.

        Args:
          split: "train", "val" or "test".
          index: The number of the record in the split.
        """
        del split, index
        return ""

    def extra_files(self) -> dict[str, str]:
        """Returns the names and the texts of files that lie beside the records."""
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
        self._summaries = {}

        def shard(split, rows):
            def numbered():
                summary = self._summaries.setdefault(split, _RunningSummary())
                for index, record in zip(rows, self.records(split, rows), strict=True):
                    summary.add(record)
                    yield index, record

            return numbered

        return {
            split: [
                shard(split, range(start, min(start + IMAGES_PER_SHARD, size)))
                for start in range(0, size, IMAGES_PER_SHARD)
            ]
            for split, size in self.sizes().items()
        }

    def _download_and_prepare(self, dl_manager, download_config=None):
        super()._download_and_prepare(dl_manager, download_config)
        # Into the scratch folder that TFDS renames when all is done.
        splits = {s: dataclasses.asdict(v.value()) for s, v in self._summaries.items()}
        texts = {SUMMARY_FILE: json.dumps(splits, indent=2) + "\n"} | self.extra_files()
        for name, text in texts.items():
            (epath.Path(self.data_dir) / name).write_text(text)


class _RunningSummary:
    def __init__(self):
        self._images = self._captions = 0
        self._digest = hashlib.sha256()

    def add(self, record):
        captions = [c.decode() if isinstance(c, bytes) else c for c in record["captions"]]
        ids = [int(number) for number in record["caption_ids"]]
        text = json.dumps([int(record["image_id"]), captions, ids])
        self._digest.update(hashlib.sha256(record["image"]).digest() + text.encode())
        self._images += 1
        self._captions += len(captions)

    def value(self):
        return SplitSummary(self._images, self._captions, self._digest.hexdigest()[:16])


def prepare(builder: PairBuilder) -> None:
    """Writes the dataset unless a complete one is there; TFDS renames it into place when done."""
    # TFDS announces a download of unknown size; nothing is downloaded.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")


def stored_summaries(builder: PairBuilder) -> dict[str, SplitSummary]:
    """Returns what was written of each split; {} for datasets from before there were summaries."""
    path = epath.Path(builder.data_dir) / SUMMARY_FILE
    if not path.exists():
        return {}
    return {split: SplitSummary(**value) for split, value in json.loads(path.read_text()).items()}

"""The TFDS records that every dataset of captioned images is prepared into, and their reader."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from fne_jax.data.pairs import PairDataset
from fne_jax.data.sources.shapes_scenes import SceneTruth
from fne_jax.errors import UserError, first_line
from fne_jax.files import as_user_error

SUMMARY_FILE = "prepared.json"
# 2.6 GB of COCO's images.
IMAGES_PER_SHARD = 16_384
_INFO_FILE = "dataset_info.json"  # of TFDS
_ADVICE = "delete that folder and prepare the dataset again"
# What a JSON file that is no such file leads to.
_MALFORMED = (OSError, ValueError, TypeError, LookupError)
# Records that are read at a time where all of them are.
_CHUNK = 256


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


class RecordSource:
    """The records of a prepared split; a TFDS data source with errors for users.

    Args:
      source: The random-access source of the split that TFDS gives.
      where: The prepared dataset and the split, for messages.
      source_file: Returns the file that a record was made of, "" if it is not known.
      checksum: Stands for what the records hold.

    Attributes:
      source_file: As given.
      checksum: As given.
    """

    def __init__(
        self,
        source: Sequence[dict[str, Any]],
        where: str,
        source_file: Callable[[int], str] = lambda index: "",
        checksum: str = "",
    ):
        self._source, self._where = source, where
        self.source_file, self.checksum = source_file, checksum

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a record."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns records.

        Raises:
          UserError: If one cannot be read; it names the first.
        """
        try:
            return self._source.__getitems__(indices)
        except Exception as error:
            for index in indices:
                try:
                    self._source.__getitems__([index])
                # ArrayRecord raises RuntimeError, a protocol buffer its own.
                except Exception as fault:
                    raise self.damage(index, fault) from fault
            raise error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields all records in order, a few hundred of them in memory."""
        for start in range(0, len(self), _CHUNK):
            yield from self.__getitems__(list(range(start, min(start + _CHUNK, len(self)))))

    def damage(self, index: int, fault: Exception) -> UserError:
        """Returns the error that a record is damaged."""
        file = self.source_file(index)
        return UserError(
            f"record {index} of {self._where}{file and f', made of {file},'} is damaged "
            f"({first_line(fault)}); delete that folder and prepare the dataset again"
        )


class _LocalInfo(tfds.core.DatasetInfo):
    """What TFDS notes of a dataset; of ones on this machine, whose names are nobody's business."""

    def initialize_from_bucket(self) -> None:
        """Does nothing, where TFDS asks Google's bucket for a dataset of that name."""

    def read_from_directory(self, dataset_info_dir: Any) -> None:
        """Reads what is noted in a folder; UserError if it is damaged."""
        # Whatever the readers of TFDS and of its buffers raise.
        with as_user_error(f"{dataset_info_dir}: is damaged", _ADVICE, Exception):
            super().read_from_directory(dataset_info_dir)


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

    def known_truth(self, records: list[dict[str, Any]]) -> SceneTruth | None:
        """Returns the truth of a split from its records without their images, if it is known."""
        del records
        return None

    def source_file(self, split: str, index: int) -> str:
        """Returns the file that a record of a split was made of, "" if there is none."""
        del split, index
        return ""

    def extra_files(self) -> dict[str, str]:
        """Returns the names and the texts of files that lie beside the records."""
        return {}

    def prepare(self) -> None:
        """Writes the dataset unless a complete one is there; TFDS renames it into place when done.

        Raises:
          OSError: If it cannot be written.
          UserError: If what is there is damaged.
        """
        folder = epath.Path(self.data_dir)
        if folder.exists() and not (folder / _INFO_FILE).exists():  # which TFDS takes for complete
            raise UserError(f"{folder}: is damaged: {_INFO_FILE} does not exist; {_ADVICE}")
        # TFDS announces a download of unknown size; nothing is downloaded.
        with contextlib.redirect_stdout(io.StringIO()):
            self.download_and_prepare(file_format="array_record")

    def summaries(self) -> dict[str, SplitSummary]:
        """Returns what was written of each split of a prepared dataset.

        Raises:
          UserError: If that is damaged.
        """
        path = epath.Path(self.data_dir) / SUMMARY_FILE
        advice = "delete its folder and prepare the dataset again"
        with as_user_error(f"{path}: is damaged", advice, _MALFORMED):
            content = json.loads(path.read_text())
            return {split: SplitSummary(**content[split]) for split in content}

    def record_source(self, split: str) -> RecordSource:
        """Returns the records of a split of a prepared dataset, their images as JPEGs."""
        return RecordSource(
            self.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}),
            f"the split {split} in {self.data_dir}",
            lambda index: self.source_file(split, index),
            self.summaries()[split].checksum,
        )

    def load_split(self, split: str) -> PairDataset:
        """Returns a split of a prepared dataset: its captions, and its images when asked for.

        Raises:
          UserError: If a record is damaged; it names the record.
        """
        source = self.record_source(split)
        rows = [{name: row[name] for name in row if name != "image"} for row in source]
        captions = [[text.decode() for text in row["captions"]] for row in rows]
        counts = [len(texts) for texts in captions]
        return PairDataset(
            captions=list(itertools.chain.from_iterable(captions)),
            caption_image=np.repeat(np.arange(len(rows), dtype=np.int32), counts),
            image_id=np.array([row["image_id"] for row in rows], np.int32),
            images=source,
            caption_id=np.concatenate([row["caption_ids"] for row in rows]),
            source_image_id=[
                row["source_id"].decode() if "source_id" in row else str(row["image_id"])
                for row in rows
            ],
            truth=self.known_truth(rows),
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
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

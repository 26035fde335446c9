"""Prepared datasets: a folder with the images as TFDS keeps them, and a table for each split.

The images of all splits lie in ArrayRecord files, a dataset of TFDS with the one split `images`. A
table `train.arrow` (`val`, `test`) has a row an image: the number of its record, its ids, captions
and the digest of its JPEG. It is read by memory map, and its own digest compared first, since Arrow
crashes on damaged files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import resource
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fne_jax.data.pairs import SPLITS, PairDataset
from fne_jax.data.sources.image_files import Stamp, stamps_of
from fne_jax.data.sources.listing import Skipped
from fne_jax.data.sources.shapes_scenes import FACT_FIELDS, MAX_OBJECTS, SCENE_FIELDS, SceneTruth
from fne_jax.errors import UserError, first_line
from fne_jax.files import as_user_error, write_atomically

LAYOUT = 3
ABOUT_FILE = "prepared.json"
SKIPPED_FILE = "skipped.json"
_INPUTS_FILE = "inputs.arrow"
_DATASET, _IMAGES = "captioned_images", "images"  # TFDS's names for the dataset and its split
RECORDS = f"{_DATASET}-{_IMAGES}"  # how its files of records begin
_ADVICE = "delete that folder and prepare the dataset again (`python -m fne_jax.prepare`)"
_ROWS_PER_BATCH = 65_536
_OTHER_FILES = 1024  # that a process may hold open beside those of records, each of which stays
_TEXTS_AT_ONCE = 4096  # where all of them are read
_CHUNK = 256  # records that are read at a time where all of them are
# What a file that is no such file leads to; pyarrow's own errors are of these kinds.
_MALFORMED = (OSError, ValueError, TypeError, LookupError, RecursionError)
_INPUTS = pa.schema([("file", pa.string()), ("size", pa.int64()), ("modified", pa.int64())])
_ROWS = pa.schema(
    [
        ("record", pa.int64()),
        ("image_id", pa.int64()),
        ("source_id", pa.string()),
        ("file", pa.string()),
        ("digest", pa.binary(32)),
        ("captions", pa.list_(pa.string())),
        ("caption_ids", pa.list_(pa.int64())),
        ("scene", pa.list_(pa.int32())),  # of rendered scenes, as is the next
        ("facts", pa.list_(pa.int32())),
    ]
)


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """How many images and captions a split holds, and a checksum of them.

    That is 16 hexadecimal digits over JPEGs, captions and ids in their order. It says nothing of
    how the dataset was built, so the same source gives the same on any machine.
    """

    images: int
    captions: int
    checksum: str


def image_features() -> dict[str, Any]:
    """Returns TFDS's features of a record."""
    import tensorflow_datasets as tfds

    return {"image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")}


class RecordSource:
    """The images of a split, in order, with errors for users; nothing is opened before one is read.

    `checksum` stands for what the records hold.
    """

    def __init__(self, folder: pathlib.Path, split: str, table: pa.Table, checksum: str):
        self._folder, self._split, self.checksum = folder, split, checksum
        self._rows, self._files = table["record"].to_numpy(), table["file"]

    @functools.cached_property
    def _source(self):
        # Kept out of the module's imports: captions alone are read without it.
        import tensorflow_datasets as tfds

        with as_user_error(f"{self._folder}: is damaged", _ADVICE, Exception):
            builder = tfds.builder_from_directory(self._folder)
            _allow_open_files(sum(1 for _ in self._folder.glob("*.array_record-*")))
            return builder.as_data_source(_IMAGES, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a record."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns records; raises UserError if one cannot be read, which names the first."""
        try:
            return self._read(indices)
        except Exception as error:
            for index in indices:
                try:
                    self._read([index])
                # ArrayRecord raises RuntimeError, a protocol buffer its own.
                except Exception as fault:
                    raise self.damage(index, fault) from fault
            raise error

    def _read(self, indices):
        records = self._source.__getitems__(self._rows[np.asarray(indices)].tolist())
        if any(record["image"] is None for record in records):  # of a file that was cut off
            raise EOFError("it is empty")
        return records

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields all records in order, a few hundred of them in memory."""
        for start in range(0, len(self), _CHUNK):
            yield from self.__getitems__(list(range(start, min(start + _CHUNK, len(self)))))

    def source_file(self, index: int) -> str:
        """Returns the file that a record was made of, "" if it is not known."""
        return self._files[index].as_py()

    def damage(self, index: int, fault: Exception) -> UserError:
        """Returns the error that a record is damaged."""
        file = self.source_file(index)
        return UserError(
            f"record {index} of the split {self._split} in {self._folder}"
            f"{file and f', made of {file},'} is damaged ({first_line(fault)}); delete that "
            "folder, and older ones of the same images beside it, whose files it shares, and "
            "prepare the dataset again"
        )


class Texts(Sequence[str]):
    """Texts of a memory-mapped table, in several arrays, each read when it is asked for."""

    def __init__(self, parts: Sequence[pa.StringArray]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index):
        """Returns a text, or a list of those of a slice."""
        if isinstance(index, slice):
            return pa.chunked_array(self._parts, pa.string())[index].to_pylist()
        place = range(len(self))[index]
        part = int(np.searchsorted(self._ends, place, "right"))
        return self._parts[part][place - int(self._ends[part])].as_py()

    def __iter__(self) -> Iterator[str]:
        """Yields all texts, a few thousand of them in memory."""
        for part in self._parts:
            for start in range(0, len(part), _TEXTS_AT_ONCE):
                yield from part.slice(start, _TEXTS_AT_ONCE).to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def _allow_open_files(count):
    """Lets the process hold so many files open beside the usual ones, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (
        count + _OTHER_FILES if hard == resource.RLIM_INFINITY else min(count + _OTHER_FILES, hard)
    )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class TableWriter:
    """Writes the table of a split to a file row by row, and sums it up."""

    def __init__(self, path: pathlib.Path):
        self._writer = pa.ipc.new_file(str(path), _ROWS)
        self._rows: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self._images = self._captions = 0

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row with the columns of the table, those of scenes where there are any."""
        self._digest.update(_told(row))
        self._images += 1
        self._captions += len(row["captions"])
        self._rows.append(row)
        if len(self._rows) == _ROWS_PER_BATCH:
            self._flush()

    def close(self) -> SplitSummary:
        """Ends the file, and returns what it holds."""
        self._flush()
        self._writer.close()
        return SplitSummary(self._images, self._captions, self._digest.hexdigest()[:16])

    def _flush(self):
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, _ROWS))
        self._rows = []


def write_notes(
    folder: pathlib.Path,
    origin: Mapping[str, Any],
    inputs: tuple[Sequence[str], Sequence[Stamp]],
    summaries: Mapping[str, SplitSummary],
    shards: Mapping[str, tuple[str, int]],
    skipped: str,
) -> None:
    """Writes all that lies beside the records and the tables of a prepared dataset.

    The folder has both, and was made of `origin` (see `Prepared`) by reading the files of `inputs`,
    which had these stamps. For each file of records, in order, `shards` has the key of its shard
    and the records in it. `skipped` is the text of a JSON list. Raises OSError if something cannot
    be written.
    """
    import tensorflow_datasets as tfds

    names, stamps = inputs
    sizes, modified = zip(*stamps, strict=True) if stamps else ((), ())
    table = pa.table([pa.array(names, pa.string()), sizes, modified], _INPUTS)
    with pa.ipc.new_file(str(folder / _INPUTS_FILE), _INPUTS) as writer:
        writer.write_table(table)
    write_atomically(folder / SKIPPED_FILE, skipped)
    split = tfds.core.SplitInfo(
        name=_IMAGES,
        shard_lengths=[records for _, records in shards.values()],
        num_bytes=sum((folder / name).stat().st_size for name in shards),
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=_DATASET, split=_IMAGES, filetype_suffix="array_record"
        ),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=image_features(), split_infos=[split], check_data=False
    )
    about = {
        "layout": LAYOUT,
        "origin": origin,
        "splits": {name: dataclasses.asdict(summary) for name, summary in summaries.items()},
        "shards": {name: key for name, (key, _) in shards.items()},
        "tables": {
            name: _digest_of(folder / name) for name in (*map(table_name, SPLITS), _INPUTS_FILE)
        },
    }
    write_atomically(folder / ABOUT_FILE, json.dumps(about, indent=2) + "\n")


def table_name(split: str) -> str:
    """Returns the name of the file that a split's table lies in."""
    return f"{split}.arrow"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared dataset.

    Attributes:
      folder: Its folder.
      origin: What it was made of: the fields of `config.data` that tell, and the listing's files.
      summaries: What each split holds.
      shards: The keys of the files of records by their names.
      tables: The digests of the tables by their names.
    """

    folder: pathlib.Path
    origin: Mapping[str, Any]
    summaries: Mapping[str, SplitSummary]
    shards: Mapping[str, str]
    tables: Mapping[str, str]

    @classmethod
    def open(cls, folder: pathlib.Path) -> Prepared:
        """Opens a folder; raises UserError if it is damaged, or of a version of another layout."""
        with as_user_error(f"{folder / ABOUT_FILE}: is damaged", _ADVICE, _MALFORMED):
            about = json.loads((folder / ABOUT_FILE).read_text())
            if about["layout"] != LAYOUT:
                raise ValueError(f"has layout {about['layout']}, this version reads {LAYOUT}")
            summaries = {name: SplitSummary(**about["splits"][name]) for name in SPLITS}
            shards, tables = dict(about["shards"]), dict(about["tables"])
            return cls(folder, about["origin"], summaries, shards, tables)

    def is_current(self) -> bool:
        """Returns whether all files that it was made of are as they were."""
        with self._reading(_INPUTS_FILE) as table:
            sizes, modified = (table[name].to_pylist() for name in ("size", "modified"))
            return stamps_of(table["file"].to_pylist()) == list(zip(sizes, modified, strict=True))

    def load_split(self, split: str) -> PairDataset:
        """Returns a split: its captions, and its images when they are asked for.

        Raises UserError if it is damaged, or has no image of the split.
        """
        if not self.summaries[split].images:
            there = " and ".join(name for name in SPLITS if self.summaries[name].images)
            raise UserError(f"{self.folder}: no image of the split {split!r}; it has {there} alone")
        with self._reading(table_name(split)) as table:
            rows = np.arange(len(table), dtype=np.int32)
            return PairDataset(
                captions=Texts([part.flatten() for part in table["captions"].chunks]),
                caption_image=np.repeat(rows, pc.list_value_length(table["captions"]).to_numpy()),
                image_id=table["image_id"].to_numpy().astype(np.int32),
                images=self._images(split, table),
                caption_id=pc.list_flatten(table["caption_ids"]).to_numpy(),
                source_image_id=Texts(table["source_id"].chunks),
                truth=_truth(table),
            )

    def check(self, split: str) -> None:
        """Reads all of a split, and compares it with what was noted when it was written.

        Raises UserError if a record is damaged, or another than it was; it names the first.
        """
        noted = self.summaries[split]
        with self._reading(table_name(split)) as table:
            again, images, count = hashlib.sha256(), self._images(split, table), 0
            columns = table.select(["image_id", "captions", "caption_ids", "digest"])
            rows = (row for batch in columns.to_batches() for row in batch.to_pylist())
            for index, (row, record) in enumerate(zip(rows, images, strict=True)):
                count += len(row["captions"])
                if hashlib.sha256(record["image"]).digest() != row["digest"]:
                    raise images.damage(index, ValueError("not the image that was written"))
                again.update(_told(row))
        if SplitSummary(len(images), count, again.hexdigest()[:16]) != noted:
            raise UserError(
                f"{self.folder}: the split {split} was written with {noted.images} images and "
                f"checksum {noted.checksum}; its files have changed; {_ADVICE}"
            )

    def copies(self) -> list[list[tuple[str, str]]]:
        """Returns the split and the file of images whose JPEGs are the same, those of each JPEG."""
        tables = []
        for split in self.summaries:
            with self._reading(table_name(split)) as table:
                columns = table.select(["digest", "file"])
                tables.append(columns.append_column("split", pa.repeat(split, len(table))))
        table = pa.concat_tables(tables)
        counts = table["digest"].value_counts()
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        found: dict[bytes, list[tuple[str, str]]] = {}
        for row in table.filter(pc.is_in(table["digest"], repeated)).to_pylist():
            found.setdefault(row["digest"], []).append((row["split"], row["file"]))
        return list(found.values())

    def skipped(self) -> list[Skipped]:
        """Returns what was left out."""
        path = self.folder / SKIPPED_FILE
        with as_user_error(f"{path}: is damaged", _ADVICE, _MALFORMED):
            return [Skipped(**entry) for entry in json.loads(path.read_text())]

    def _images(self, split, table):
        return RecordSource(self.folder, split, table, self.summaries[split].checksum)

    @contextlib.contextmanager
    def _reading(self, name):
        """Yields a table by memory map, which ends with what holds a part of it."""
        path = self.folder / name
        with as_user_error(f"{path}: is damaged", _ADVICE, _MALFORMED):
            if _digest_of(path) != self.tables[name]:
                raise ValueError("not as it was written")
            yield pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _digest_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _told(row):
    """Returns what the checksum of a split tells of a row."""
    text = json.dumps([row["image_id"], row["captions"], row["caption_ids"]])
    return row["digest"] + text.encode()


def _truth(table):
    if not len(table) or table["scene"].null_count:
        return None
    scenes, facts = (
        table[name].combine_chunks().flatten().to_numpy() for name in ("scene", "facts")
    )
    return SceneTruth(scenes.reshape(-1, MAX_OBJECTS, SCENE_FIELDS), facts.reshape(-1, FACT_FIELDS))

"""`parquet`: tables that hold the images themselves, as Hugging Face's datasets and img2dataset's.

`.parquet` files, and the `.arrow` files of `save_to_disk`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import fsspec
import ml_collections
import pyarrow as pa
import pyarrow.parquet as pq

from fne_jax.data.sources import many_files
from fne_jax.data.sources.image_files import stamp_of
from fne_jax.data.sources.listing import ContainedImage, Container, Listing
from fne_jax.errors import UserError
from fne_jax.files import as_user_error

ENDINGS = (".parquet", ".arrow")
_ROWS = 64  # in memory at a time


def read_listing(data: ml_collections.ConfigDict) -> Listing:
    """Returns the tables that `config.data.dir` names, a folder or a pattern of files.

    `image_key` is the column of images (bytes, {bytes, path}, or paths), `caption_key` that of
    captions (text, or a list of texts), or several with commas between. Raises UserError if there
    is no file, or only some of their names tell a split.
    """
    tables = [
        Table(path, split, data.image_key, data.caption_key)
        for path, split in many_files.splits_of(many_files.named_by(data.dir, ENDINGS)).items()
    ]
    return Listing("parquet", "", [], containers=tables)


@dataclasses.dataclass(frozen=True)
class Table(Container):
    """A file of rows, one an image: its column of images, and those of captions by commas."""

    image_key: str
    caption_key: str

    def images(self) -> Iterator[tuple[ContainedImage, bytes | None]]:
        """Yields the images with their bytes; None for a caption without an image."""
        columns = [self.image_key, *self.caption_key.split(",")]
        row = 0
        with self._opened() as (schema, table):
            for batch in self._batches(schema, table, columns):
                for values in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                    name, content = self._image(values[0], row)
                    captions = [
                        text
                        for value in values[1:]
                        for text in (value if isinstance(value, list) else [value])
                    ]
                    where = f"{self.file}: row {row}" + (f", {name}" if content is None else "")
                    yield ContainedImage(name, where, captions), content
                    row += 1

    def outside(self) -> list[str]:
        """Returns the files that a column of paths names."""
        with self._opened() as (schema, table):
            kind = schema.field(self.image_key).type if self.image_key in schema.names else None
            if kind not in (pa.string(), pa.large_string()):
                return []
            batches = self._batches(schema, table, [self.image_key])
            values = [value for batch in batches for value in batch[self.image_key].to_pylist()]
        return [self._beside(value) for value in values if value and "\0" not in value]

    @contextlib.contextmanager
    def _opened(self):
        """Yields the schema of the table and the table."""
        # Damaged lengths ask for more memory than there is.
        errors = (OSError, ValueError, ImportError, MemoryError, pa.ArrowException)
        with (
            as_user_error(f"{self.file}: is damaged", errors=errors),
            fsspec.open(self.file, "rb") as file,
        ):
            if self.file.lower().endswith(".arrow"):
                table = pa.ipc.open_stream(file)
                yield table.schema, table
            else:
                table = pq.ParquetFile(file)
                yield table.schema_arrow, table

    def _batches(self, schema: pa.Schema, table: Any, columns: list[str]) -> Iterator[Any]:
        for field, name in [("image_key", columns[0]), *(("caption_key", c) for c in columns[1:])]:
            if name not in schema.names:
                raise UserError(
                    f"{self.file}: there is no column {name!r}; make config.data.{field} one of "
                    f"{', '.join(schema.names)}"
                )
        batches = (
            table.iter_batches(_ROWS, columns=columns)
            if isinstance(table, pq.ParquetFile)
            else (
                batch.slice(start, _ROWS)
                for batch in table
                for start in range(0, batch.num_rows, _ROWS)
            )
        )
        for batch in batches:
            batch.validate(full=True)  # reading what is damaged would crash
            yield batch

    def _image(self, value: Any, row: int) -> tuple[str, bytes | None]:
        """Returns the name and the bytes of an image."""
        name = f"{os.path.basename(self.file)}/{row}"
        if isinstance(value, dict):  # as `datasets` encodes an image
            name, value = value.get("path") or name, value.get("bytes")
        if isinstance(value, str):
            name, beside = value, self._beside(value)
            value = None
            if "\0" not in beside and stamp_of(beside)[0] >= 0:
                with fsspec.open(beside, "rb") as file:
                    value = file.read()
        return name, value if isinstance(value, bytes) else None

    def _beside(self, name: str) -> str:
        return name if "://" in name else os.path.join(os.path.dirname(self.file), name)

"""Prepared records with random access, and errors that name a damaged one."""

from __future__ import annotations

import collections
import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from PIL import Image

from fne_jax.errors import UserError

# Records that are read at a time where all of them are.
_CHUNK = 256


class RecordSource:
    """The records of a prepared split; a TFDS data source with errors for users.

    Args:
      source: TFDS' random-access source of the split.
      where: the prepared dataset and the split, for messages.
    """

    def __init__(self, source: Sequence[dict[str, Any]], where: str):
        self._source, self._where = source, where

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a record."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns records.

        Raises:
          UserError: naming the first that cannot be read.
        """
        try:
            return self._source.__getitems__(indices)
        except Exception as error:
            for index in indices:
                try:
                    self._source.__getitems__([index])
                # ArrayRecord raises RuntimeError, a protocol buffer its own.
                except Exception as fault:
                    raise UserError(self._message(index, fault)) from fault
            raise error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields all records in order, a few hundred of them in memory."""
        for start in range(0, len(self), _CHUNK):
            yield from self.__getitems__(list(range(start, min(start + _CHUNK, len(self)))))

    def require_whole(self, indices: Sequence[int]) -> None:
        """Raises UserError, naming the record, if one of them cannot be read and decoded."""
        for index in indices:
            record = self[index]
            try:
                with Image.open(io.BytesIO(record["image"]), formats=("JPEG",)) as picture:
                    picture.load()
            except Exception as fault:
                raise UserError(self._message(index, fault)) from fault

    def _message(self, index, fault):
        reason = (str(fault).splitlines() or [""])[0]
        return (
            f"record {index} of {self._where} is damaged ({reason}); delete that folder and "
            "prepare the dataset again"
        )


class RecentRecords:
    """Reads records for tf.data, and finds the damaged one when that reports a failure.

    tf.data says neither which record failed nor when it was asked for, only that some batch cannot
    be had.

    Args:
      source: of the records.
      remembered: how many of the last records may be concerned.
    """

    def __init__(self, source: RecordSource, remembered: int):
        self._source = source
        self._last = collections.deque(maxlen=remembered)

    def jpegs(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the JPEGs of records."""
        self._last.extend(indices)
        return [record["image"] for record in self._source.__getitems__(indices)]

    @contextlib.contextmanager
    def damage_named(self) -> Iterator[None]:
        """Turns TensorFlow's errors about a damaged record into a UserError that names it."""
        try:
            yield
        except tf.errors.OpError:
            self._source.require_whole(list(self._last))
            raise

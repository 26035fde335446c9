"""Prepared records with random access, and errors that name a damaged one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fne_jax.errors import UserError, first_line

# Records that are read at a time where all of them are.
_CHUNK = 256


class RecordSource:
    """The records of a prepared split; a TFDS data source with errors for users.

    Args:
      source: The random-access source of the split that TFDS gives.
      where: The prepared dataset and the split, for messages.
      source_file: Returns the file that a record was made of, "" if it is not known.
      checksum: Stands for what the records hold; "" where it is still to be computed.
    """

    def __init__(
        self,
        source: Sequence[dict[str, Any]],
        where: str,
        source_file: Callable[[int], str] = lambda index: "",
        checksum: str = "",
    ):
        self._source, self._where = source, where
        self._source_file, self._checksum = source_file, checksum

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

    def checksum(self) -> str:
        """Returns digits that stand for the images; where none were stored, all are read."""
        if not self._checksum:
            digest = hashlib.sha256()
            for record in self:
                digest.update(hashlib.sha256(record["image"]).digest())
            self._checksum = digest.hexdigest()[:16]
        return self._checksum

    def source_file(self, index: int) -> str:
        """Returns the file that a record was made of, "" if it is not known."""
        return self._source_file(index)

    def damage(self, index: int, fault: Exception) -> UserError:
        """Returns the error that a record is damaged."""
        file = self._source_file(index)
        return UserError(
            f"record {index} of {self._where}{file and f', made of {file},'} is damaged "
            f"({first_line(fault)}); delete that folder and prepare the dataset again"
        )

"""Rows of embeddings kept in a folder, by names, so that each is computed once.

The folder holds parts, `part-000001` and so on, each written whole or not at all:

  rows.npy      [rows, dim] float16; all arrays are memory-mapped
  names.npy     [bytes] uint8, the names of the rows in UTF-8, one after the other
  ends.npy      [rows] int64, where each name ends
  stamps.npy    [rows, 2] int64: of a file its size and its time of change in nanoseconds
  about.json    the layout's number, `model`, what the rows were computed by, and `complete`

Parts are added while rows are computed. The last one is `complete`: it has all rows in the order of
the gallery, those of earlier parts were copied into it, and these are removed. Whenever a process
ends, the parts that are there can be gone on with: of a name that comes twice the later row counts,
and what is before a complete part does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fne_jax.errors import UserError, first_line
from fne_jax.files import (
    locked,
    refuse_snapshot,
    remove_leftovers,
    whole_folder,
    write_atomically,
)
from fne_jax.index.names import Names

ROWS, NAMES, ENDS, STAMPS = "rows.npy", "names.npy", "ends.npy", "stamps.npy"
ABOUT = "about.json"
# Counts up with each change of what a part holds.
LAYOUT = 2
_PART = re.compile(r"part-(\d{6,})")
_COPIED_ROWS = 16_384
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows as they are kept.

    Attributes:
      folder: Where they lie.
      dim: The dimension of the rows.
      model: What the rows were computed by.
      complete: Whether these are all rows of the folder.
    """

    folder: pathlib.Path
    dim: int
    model: Mapping[str, Any]
    complete: bool

    # No part keeps its maps: hours of embedding leave more of them than a process may have files
    # open.
    def open_rows(self) -> np.ndarray:
        """Returns the [rows, dim] float16 as a map of the file."""
        return _mapped(self.folder / ROWS)

    def open_names(self) -> Names:
        """Returns the name of each row, as maps of the files."""
        return Names(_mapped(self.folder / NAMES), _mapped(self.folder / ENDS))

    def open_stamps(self) -> np.ndarray:
        """Returns the [rows, 2] int64 stamps as a map of the file."""
        return _mapped(self.folder / STAMPS)


class KeptRows:
    """The parts of a folder, to be read and added to by one process at a time.

    The folder is there, and no other process changes it meanwhile, see `held`. Rows that another
    model computed are dropped.

    Attributes:
      parts: The parts that are there, in their order.
    """

    def __init__(self, folder: pathlib.Path, model: Mapping[str, Any]):
        self._folder, self._model = folder, json.loads(json.dumps(model))
        self._number = 0
        self.parts = self._read()

    def places(self) -> dict[str, tuple[list[int], int, int]]:
        """Returns the stamp of each name, and the part and the row where it is kept."""
        return {
            name: (stamp, number, row)
            for number, part in enumerate(self.parts)
            for row, (name, stamp) in enumerate(
                zip(part.open_names(), part.open_stamps().tolist(), strict=True)
            )
        }

    def add(self, names: Sequence[str], stamps: np.ndarray, rows: np.ndarray) -> None:
        """Adds rows that were computed now, [rows, dim] floats of about length 1, as a part."""
        rows = np.asarray(rows, np.float16)
        self._write(Names.of(names), stamps, [rows], rows.shape, complete=False)

    def is_complete(self, names: Names, stamps: np.ndarray) -> bool:
        """Returns whether just these rows are kept, in this order, as one part."""
        if len(self.parts) != 1 or not self.parts[0].complete:
            return False
        only = self.parts[0]
        return only.open_names() == names and np.array_equal(only.open_stamps(), stamps)

    def complete(self, names: Names, stamps: np.ndarray) -> Part:
        """Keeps the rows of some names alone, in their order, and returns them as one part.

        They all are among `places`.
        """
        before = list(self.parts)
        if self.is_complete(names, stamps):
            return before[0]
        places = self.places()
        sources = np.array([places[name][1:] for name in names])
        shape = (len(names), before[0].dim)
        self._write(names, stamps, self._copied(sources), shape, complete=True)
        for part in before:
            _remove(part.folder)
        self.parts = self.parts[-1:]
        return self.parts[0]

    def _copied(self, sources):
        """Yields the rows at [rows, 2] pairs of part and row, some at a time."""
        for start in range(0, len(sources), _COPIED_ROWS):
            of_part, row = sources[start : start + _COPIED_ROWS].T
            copied = np.empty((len(row), self.parts[0].dim), np.float16)
            for number in np.unique(of_part):
                mine = of_part == number
                copied[mine] = self.parts[number].open_rows()[row[mine]]
            yield copied

    def _write(self, names, stamps, blocks, shape, *, complete):
        self._number += 1  # whatever becomes of it, no other part takes the number
        folder = self._folder / f"part-{self._number:06d}"
        about = {"layout": LAYOUT, "complete": complete, "model": self._model}
        with whole_folder(folder) as scratch:
            _save(scratch / ROWS, "<f2", shape, blocks)
            _save(scratch / NAMES, "u1", names.text.shape, [names.text])
            _save(scratch / ENDS, "<i8", names.ends.shape, [names.ends])
            _save(scratch / STAMPS, "<i8", stamps.shape, [stamps])
            write_atomically(scratch / ABOUT, json.dumps(about, indent=2) + "\n")
        self.parts.append(Part(folder, shape[1], self._model, complete))

    def _read(self):
        """Returns the parts that count, and removes the others, saying why."""
        remove_leftovers(self._folder / "part-*")
        folders = sorted(
            (path for path in self._folder.iterdir() if _PART.fullmatch(path.name)), key=_number
        )
        parts, foreign = [], None
        for folder in folders:
            self._number = _number(folder)
            try:
                part = _read_part(folder)
            except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError) as error:
                reason = first_line(error)
                _log.warning("%s is damaged: %s; its rows are computed again", folder, reason)
                _remove(folder)
                continue
            if part.model != self._model:
                foreign = part.model
                _remove(folder)
                continue
            if part.complete:
                for old in parts:
                    _remove(old.folder)
                parts = []
            parts.append(part)
        if foreign is not None:
            _log.info(
                "%s: was made by %s, this is %s: everything is embedded again",
                self._folder, _in_words(foreign), _in_words(self._model),
            )  # fmt: skip
        if parts and len({part.dim for part in parts}) > 1:
            raise UserError(f"{self._folder}: parts of several dimensions; delete the folder")
        return parts


def _number(folder):
    return int(_PART.fullmatch(folder.name).group(1))


def _remove(folder):
    """Removes a part; if the process ends halfway, what is left of it is not taken for one."""
    leftover = folder.with_name(f"{folder.name}.removed.incomplete")
    os.replace(folder, leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def _read_part(folder):
    about = json.loads((folder / ABOUT).read_bytes())
    if about["layout"] != LAYOUT:
        raise ValueError(f"{ABOUT} has not the layout {LAYOUT}")
    rows = _mapped(folder / ROWS)
    part = Part(folder, rows.shape[-1], about["model"], about["complete"])
    names, stamps = part.open_names(), part.open_stamps()
    if not rows.dtype == np.float16 or rows.ndim != 2 or not len(rows) == len(names) == len(stamps):
        raise ValueError(
            f"{len(names)} names and {len(stamps)} stamps for {ROWS}, {rows.dtype} "
            f"{list(rows.shape)}"
        )
    if len(names.text) != (names.ends[-1] if len(names) else 0):
        raise ValueError(f"{NAMES} does not end where {ENDS} says")
    return part


def _mapped(path):
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _save(path, dtype, shape, blocks):
    """Writes an array; not through a map, where a full disk would end the process silently."""
    with path.open("wb") as stream:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(stream, header)
        for block in blocks:
            stream.write(np.ascontiguousarray(block, dtype))


def _in_words(model):
    step = model.get("step") if isinstance(model, dict) else None
    return f"the checkpoint of step {step}" if step is not None else "another model"


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from changing a folder, which is created, while the block runs.

    It waits for one that does. A folder that this process must not write to is only read.

    Raises OSError if there is no such folder and it cannot be created.
    """

    def wait(holder):
        _log.info("%s: another process (%s) is embedding there; waiting for it", folder, holder)

    refuse_snapshot(folder)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / "lock", wait, "search from one process"))
        except OSError as error:
            if error.errno not in _READ_ONLY or not folder.is_dir():
                raise
        yield

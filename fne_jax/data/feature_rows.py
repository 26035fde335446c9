"""An array on disk of which a few rows are read at a time: what frozen encoders made of a split."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401, lets NumPy know bfloat16 by its name
import numpy as np

from fne_jax import files

_ABOUT, _VALUES = "about.json", "values.bin"


@dataclasses.dataclass(frozen=True)
class FeatureRows:
    """Rows that lie in a file one after the other, padding left out.

    Attributes:
      values: [rows, ...] array, or, with a mask, the [tokens in all, ...] values of all tokens.
      mask: [rows, tokens] bool, False where a row has no token; None for rows without tokens.
    """

    values: np.ndarray
    mask: np.ndarray | None

    def __len__(self):
        return len(self.values if self.mask is None else self.mask)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Returns the [n, ...] rows of [n] indices, with 0 where there is no token."""
        if self.mask is None:
            return self.values[rows]
        mask = self.mask[rows]
        out = np.zeros((*mask.shape, *self.values.shape[1:]), self.values.dtype)
        for place, row in enumerate(rows):
            out[place, mask[place]] = self.values[self._starts[row] : self._starts[row + 1]]
        return out

    def __post_init__(self):
        if self.mask is not None:
            starts = np.concatenate([[0], np.cumsum(self.mask.sum(axis=1, dtype=np.int64))])
            object.__setattr__(self, "_starts", starts)


def write_rows(
    folder: pathlib.Path,
    about: Mapping[str, Any],
    parts: Iterable[np.ndarray],
    mask: np.ndarray | None,
) -> None:
    """Writes rows to a folder, which appears whole or not at all.

    Args:
      folder: The folder, not there yet.
      about: What the rows are, as JSON has it.
      parts: The rows in order, [n, ...] arrays.
      mask: [rows, tokens] bool, False where a row has no token; None for rows without tokens.

    Raises:
      OSError: If the folder cannot be written.
    """
    row, dtype, shape = 0, None, None
    with files.whole_folder(folder) as scratch, open(scratch / _VALUES, "wb") as file:
        for part in parts:
            dtype, shape = part.dtype.name, part.shape[1:] if mask is None else part.shape[2:]
            own = part if mask is None else part[mask[row : row + len(part)]]
            file.write(np.ascontiguousarray(own).view(np.uint8).data)
            row += len(part)
        content = {"about": about, "dtype": dtype, "shape": shape}
        (scratch / _ABOUT).write_text(json.dumps(content, indent=2) + "\n")


def read_rows(
    folder: pathlib.Path, about: Mapping[str, Any], count: int, mask: np.ndarray | None
) -> FeatureRows | None:
    """Returns the rows that a folder holds, by memory map; None if there is no such folder.

    Args:
      folder: The folder.
      about: What the rows must be.
      count: The number of rows.
      mask: As it was written.

    Raises:
      UserError: If what is there is damaged, or something else.
    """
    if not folder.is_dir():
        return None
    advice = "delete that folder, and its rows are computed again"
    with files.as_user_error(
        f"{folder} is damaged", advice, (OSError, ValueError, KeyError, TypeError)
    ):
        content = json.loads((folder / _ABOUT).read_text())
        dtype, shape = np.dtype(content["dtype"]), tuple(content["shape"])
        if content["about"] != json.loads(json.dumps(about)):
            raise ValueError(f"{_ABOUT} tells of other rows")
        values = np.memmap(folder / _VALUES, dtype, mode="r")
        total = count if mask is None else int(mask.sum())
        return FeatureRows(values.reshape(total, *shape), mask)

"""Tables, CSV or JSON lines, as programs and spreadsheets write them, and cells for the latter."""

from __future__ import annotations

import csv
import io
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fne_jax.data.sources import listing
from fne_jax.errors import UserError
from fne_jax.files import AnyPath, as_user_error

_DELIMITERS = (",", ";", "\t", "|")
# Beginnings of texts that spreadsheets take for formulas.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUL, _SYMBOL_FOR_NUL = "\0", "\N{SYMBOL FOR NULL}"


def read_rows(
    path: AnyPath,
    kind: str,
    required: Sequence[str],
    columns: Sequence[str],
    other_names: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place of each row, for messages, and its values by name, None for an empty cell.

    A CSV may separate by commas, semicolons, tabs or bars, in UTF-8 or in UTF-16 with a byte order
    mark, and its columns may be in any order and case.

    Args:
      path: The file.
      kind: "csv" (a header names the columns) or "jsonl" (one object a line).
      required: The names without which the file is none of its kind.
      columns: All names that are read; others may be there.
      other_names: Other names of columns, which count where those are missing.

    Raises UserError, naming the file and the line, if it cannot be read or lacks what is required.
    """
    text = listing.read_text(path)
    if kind == "csv":
        yield from _csv_rows(path, text, required, columns, other_names)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        row = listing.parse_json(where, line)
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, got {line[:40]!r}")
        row = dict(zip(_named(row, other_names), row.values(), strict=True))
        for name in required:
            if name not in row:
                raise UserError(f"{where}: the key {name!r} is missing; there are {columns}")
        yield where, row


def _csv_rows(path, text, required, columns, other_names):
    delimiter, header = _csv_header(path, text, required, columns, other_names)
    lines = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        # Where the names of the columns are spaced, so are the cells.
        skipinitialspace=any(name.startswith(" ") for name in header[1:]),
    )
    names = _named((name.strip().lower() for name in header), other_names)
    try:
        next(lines)
        for cells in lines:
            where = f"{path}: line {lines.line_num}"
            if not any(map(str.strip, cells)):  # as Excel leaves below a table
                continue
            if any(cells[len(names) :]):
                raise UserError(
                    f"{where}: more fields than columns; put texts with {delimiter!r} between "
                    'quotation marks (")'
                )
            # A quotation mark that opens a text, rather than a cell, takes in the rows below it.
            for cell in cells:
                if any(row.count(delimiter) >= len(names) - 1 for row in cell.split("\n")[1:]):
                    raise UserError(
                        f"{where}: one field holds whole rows, {cell[:60]!r}...; put texts with "
                        'quotation marks (") between quotation marks, and double their own'
                    )
            row = dict.fromkeys(names) | dict(zip(names, cells, strict=False))
            yield where, {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise UserError(f"{path}: line {lines.line_num}: not a CSV file: {error}") from error


def _csv_header(path, text, required, columns, other_names):
    """Returns the delimiter of a table, which its first line tells, and the names of the columns.

    Excel separates by semicolons where numbers have a decimal comma.
    """
    headers, names = {}, {}
    for delimiter in _DELIMITERS:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        with as_user_error(f"{path}: line 1: not a CSV file", errors=csv.Error):
            headers[delimiter] = next(lines, [])
        spelt = (name.strip().lower() for name in headers[delimiter])
        names[delimiter] = _named(spelt, other_names)
    likely = max(headers, key=lambda d: (set(required) <= set(names[d]), len(headers[d])))
    missing = [name for name in required if name not in names[likely]]
    if missing and text.startswith("sep="):
        raise UserError(f"{path}: line 1 is Excel's {text[:5]!r}; delete that line")
    if missing:
        raise UserError(
            f"{path}: the column {missing[0]!r} is missing; the first line names the columns "
            f"({', '.join(columns)}), and is {likely.join(headers[likely])!r:.80}"
        )
    for name in columns:
        if names[likely].count(name) > 1:
            raise UserError(f"{path}: the column {name!r} appears twice")
    return likely, headers[likely]


def _named(names: Iterable[str], other_names: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns names of columns, another name of one that is missing replaced by its own."""
    names = list(names)
    for name, others in other_names.items():
        found = [names.index(other) for other in others if other in names]
        if name not in names and found:
            names[found[0]] = name
    return names


def safe_cell(value: Any) -> Any:
    """Returns a value as a spreadsheet may open it; `cell_text` undoes it.

    A text that could be taken for a formula gets an apostrophe before it, and a visible symbol for
    each NUL; anything else is returned as it is.
    """
    if not isinstance(value, str):
        return value
    value = value.replace(_NUL, _SYMBOL_FOR_NUL)
    return f"'{value}" if value.lstrip("'").startswith(_FORMULA) else value


def cell_text(cell: str) -> str:
    """Returns the text that `safe_cell` made safe; a NUL stays the visible symbol."""
    return cell[1:] if cell[:1] == "'" and cell.lstrip("'").startswith(_FORMULA) else cell

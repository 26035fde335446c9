"""Texts in CSV cells that a spreadsheet must not take for formulas."""

from __future__ import annotations

from typing import Any

# Beginnings of texts that spreadsheets take for formulas.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUL, _SYMBOL_FOR_NUL = "\0", "\N{SYMBOL FOR NULL}"


def safe_cell(value: Any) -> Any:
    """Returns a value as a spreadsheet may open it; `cell_text` undoes it.

    Args:
      value: A text, which gets an apostrophe before it where it could be taken for a formula, and
        a visible symbol for each NUL; anything else is returned as it is.
    """
    if not isinstance(value, str):
        return value
    value = value.replace(_NUL, _SYMBOL_FOR_NUL)
    return f"'{value}" if value.lstrip("'").startswith(_FORMULA) else value


def cell_text(cell: str) -> str:
    """Returns the text that `safe_cell` made safe; a NUL stays the visible symbol."""
    return cell[1:] if cell[:1] == "'" and cell.lstrip("'").startswith(_FORMULA) else cell

"""`csv` and `jsonl`: pairs of one's own in a table.

Its columns are `image`, `caption` and optionally `split` and `image_id`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from fne_jax.data.sources import listing
from fne_jax.data.sources.listing import SPLIT_OF, ListedImage, Listing
from fne_jax.data.tables import read_rows
from fne_jax.errors import UserError

COLUMNS = ("image", "caption", "split", "image_id")
# Other names of a column, taken where it is missing: open_clip's, Hugging Face's, Kaggle's.
_OTHER_NAMES = {
    "image": ("filepath", "file_name", "image_name"),
    "caption": ("title", "text", "comment"),
}
# Shares of val and test where a table has no splits; the rest is train. In a small one they have
# this many images each, but no more than a fifth.
VAL_SHARE, TEST_SHARE, _LEAST = 0.05, 0.05, 20
_WHOLE = re.compile(r"[0-9]{1,18}(\.0{0,2})?")  # 1.000 is a thousand in many languages
# Texts beside each other without a comma, as NumPy writes them, which Python would join.
_UNPARTED = re.compile(r"""['"]\s+['"]""")
_log = logging.getLogger(__name__)


def read_listing(data_dir: str, kind: str) -> Listing:
    """Returns the dataset of a table, one (image, caption) pair a row.

    Paths of images are absolute, or relative to the table or to a folder beside it. Rows of the
    same file make one image. A cell may hold a list of captions. Without splits, `parted` parts the
    images.

    Args:
      data_dir: The table, or the folder that holds it alone of its kind.
      kind: "csv" (a header names the columns) or "jsonl" (one object a line).

    Raises UserError, naming file and line, if something is missing or of the wrong kind.
    """
    path = epath.Path(data_dir).expanduser()
    if not data_dir or not path.is_file():
        folder = listing.existing_folder(data_dir, f"one table *.{kind}")
        patterns = [f"*.{kind}", *(["*.tsv"] if kind == "csv" else [])]
        path = listing.one_file(folder, patterns, "a table of image and caption")
    rows = _image_rows(path, kind)
    lists = [row.where for row in rows if len(row.captions) != 1]
    if lists:
        told = "%d cells hold a list of captions, which are taken one by one, such as in %s"
        _log.warning(told, len(lists), lists[0])
    _check_whole(rows, "split", "a hash of the image's path parts them without any")
    _check_whole(rows, "image_id", "images are numbered without any")
    images = parted(listing.images_of_rows(rows))
    advice = f"; add a column 'split' with {', '.join(SPLIT_OF)}"
    return listing.checked_listing(path.stem, str(path), [path], images, advice)


def read_images(path: epath.Path, kind: str) -> list[ListedImage]:
    """Returns the images of a table, of whatever split, in the order of their first rows.

    It takes, and raises, what `read_listing` does.
    """
    rows = (dataclasses.replace(row, split="") for row in _image_rows(path, kind))
    return listing.images_of_rows(rows)


def split_of_name(name: str) -> str:
    """Returns the split of an image in a table without splits.

    It depends on the path relative to the table alone, so that an image stays where it is when rows
    are added, and when table and images are moved: of the hashed path as a fraction of its range,
    the first 5 % are val, the next 5 % test.
    """
    hashed = _fraction(name)
    if hashed < VAL_SHARE:
        return "val"
    return "test" if hashed < VAL_SHARE + TEST_SHARE else "train"


def parted(images: Sequence[ListedImage]) -> list[ListedImage]:
    """Returns the images of a listing, those without a split parted as by `split_of_name`.

    Of less than some 400 images val and test have more than it would give them: 20 each or a fifth,
    those whose hashed paths come first.
    """
    lacking = sorted(
        (one for one in images if not one.split), key=lambda one: _fraction(one.source_id)
    )
    splits = [split_of_name(one.source_id) for one in lacking]
    least = min(_LEAST, len(lacking) // 5)
    val, test = (max(splits.count(split), least) for split in ("val", "test"))
    named = {id(one): "val" if n < val else "test" for n, one in enumerate(lacking[: val + test])}
    return [
        one if one.split else dataclasses.replace(one, split=named.get(id(one), "train"))
        for one in images
    ]


def half_of_name(name: str) -> str:
    """Returns "val" or "test" for an image by its name, each for half of them."""
    return "val" if _fraction(name) < 0.5 else "test"


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _image_rows(path: epath.Path, kind: str) -> list[ListedImage]:
    rows = list(read_rows(path, kind, COLUMNS[:2], COLUMNS, _OTHER_NAMES))
    folder = os.fspath(path.parent)
    base = _folder_of_images(path.parent, rows[0][1]["image"]) if rows else path.parent

    @functools.cache  # an image has several rows
    def file_of(name):
        file = base / name
        return file, os.path.relpath(os.fspath(file), folder)

    return [_image_row(file_of, *row) for row in rows]


def _folder_of_images(folder: epath.Path, first: Any) -> epath.Path:
    """Returns where names lead from: the table's folder, or the one below that has the first."""
    if not listing.is_text(first) or not first or (folder / first).exists():
        return folder
    with contextlib.suppress(OSError):  # what may not be listed, or is too long a name
        below = [one for one in folder.iterdir() if (one / first).exists()]
        if len(below) == 1:
            return below[0]
    return folder


def _image_row(file_of, where: str, row: dict[str, Any]) -> ListedImage:
    split = row.get("split") or ""
    known = split.strip().lower() if isinstance(split, str) else split
    if known and (not isinstance(known, str) or known not in SPLIT_OF):
        raise UserError(f"{where}: split is {split!r:.60}; expected one of {', '.join(SPLIT_OF)}")
    file, name = file_of(listing.checked_name(where, "image", row["image"]))
    return ListedImage(
        split=SPLIT_OF[known] if known else "",
        path=file,
        where=where,
        image_id=_image_id(where, row.get("image_id")),
        source_id=name,
        captions=_captions(row["caption"]),
    )


def _captions(cell: Any) -> list[Any]:
    """Returns the captions of a cell, several of a list, also as pandas or JSON writes it."""
    if isinstance(cell, str) and cell.lstrip().startswith("[") and not _UNPARTED.search(cell):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            cell = ast.literal_eval(cell.strip())
    return cell if isinstance(cell, list) else [cell]


def _image_id(where: str, value: Any) -> int | None:
    text = str(value).strip()
    if value is None or _WHOLE.fullmatch(text):  # pandas writes 7.0 where other rows have none
        return None if value is None else int(text.partition(".")[0])
    missing = ", which stands for no value" if text.lower() in listing.NO_VALUE else ""
    raise UserError(
        f"{where}: image_id is {value!r:.60}{missing}; expected a whole number, or no such column, "
        "for images to be known by their paths"
    )


def _check_whole(rows: list[ListedImage], field: str, without: str) -> None:
    """Raises UserError if some rows have a value and others do not."""
    lacking = [row for row in rows if getattr(row, field) in (None, "")]
    if lacking and len(lacking) < len(rows):
        raise UserError(
            f"{lacking[0].where}: the {field} is missing, which other rows have; give all rows "
            f"one, or none: {without}"
        )

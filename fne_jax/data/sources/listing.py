"""What every listing of captioned images is read into, and the checks that all of them share."""

from __future__ import annotations

import abc
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from fne_jax.data.pairs import SPLITS
from fne_jax.data.sources.image_files import AnyImageFile
from fne_jax.errors import UserError
from fne_jax.files import as_user_error

# COCO's `restval` images belong to the training split of the published protocol.
SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"} | dict.fromkeys(
    ("valid", "validation", "dev"), "val"
)
# Far above the longest captions of Flickr30K and COCO: a longer text is a file read wrongly, such
# as a table with an unclosed quotation mark.
MAX_CAPTION_CHARACTERS = 2000
# What the records hold.
MAX_IMAGE_ID, MAX_CAPTION_ID = np.iinfo(np.int32).max, np.iinfo(np.int64).max
# What programs write into a cell for no value, in lower case.
NO_VALUE = ("nan", "none", "null", "<na>", "n/a", "#n/a")
# What spreadsheets write for a formula that fails; LibreOffice also Err: and a number.
_FORMULA_ERROR = re.compile(r"#(ref!|name\?|value!|div/0!|num!|null!|error!|spill!)|err:\d+")
_LIST = re.compile(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", re.DOTALL)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# What is often in the place of a text file, and what to do.
_SAVE = "save it as 'CSV UTF-8' in the spreadsheet"
_PACKED = {".gz": "unpack it by gunzip", ".zip": "unpack it"} | dict.fromkeys(
    (".xlsx", ".xlsm", ".xls", ".ods", ".numbers", ".gsheet"), _SAVE
)
_SIGNATURES = {
    b"\x1f\x8b": "unpack it by gunzip",
    b"PK\x03\x04": f"unpack it, or {_SAVE}",
    b"\xd0\xcf\x11\xe0": _SAVE,
}


@dataclasses.dataclass(frozen=True)
class ListedImage:
    """One image as its source lists it, nothing of it checked yet.

    Attributes:
      split: "train", "val" or "test".
      path: The file of the image.
      where: The entry in the source, for messages.
      image_id: The id of the image, unique over the dataset.
      source_id: The path of the image as the source lists it.
      captions: What stands where captions should.
      caption_ids: One number for each caption.
      truth: Of a rendered scene, the numbers of `scene` and of its captions' `facts`.
    """

    split: str
    path: AnyImageFile
    where: str
    image_id: int
    source_id: str
    captions: Sequence[Any]
    caption_ids: Sequence[int] = ()
    truth: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An image or a caption that cannot be used: its entry, the image's path, and why."""

    where: str
    image: str
    reason: str


class ContainedImage(NamedTuple):
    """One image as the file that holds it lists it.

    It has the name or number by which the source itself knows it, its place in the file, for
    messages, and what stands where captions should.
    """

    source_id: str
    where: str
    captions: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Container(abc.ABC):
    """A file that holds images with their captions, such as a tar; equal ones list the same.

    All its images are of one split; "" draws that by their names.
    """

    file: str
    split: str

    @abc.abstractmethod
    def images(self) -> Iterator[tuple[ContainedImage, bytes | None]]:
        """Yields the images with their bytes, or None where there are none, in one pass.

        Raises UserError if the file cannot be read.
        """

    def outside(self) -> Sequence[str]:
        """Returns the files elsewhere that it reads images from, which may change by themselves."""
        return ()


@dataclasses.dataclass(frozen=True)
class Listing:
    """A dataset as its files list it.

    Attributes:
      name: The name of the dataset, part of the name of the prepared one.
      digest: The digest of the files that list it; another digest is another dataset.
      images: All images, those of train first, then val and test, each in the source's order.
      files: The paths of the files that list it.
      containers: The files that list and hold images of their own, which come after all others.
    """

    name: str
    digest: str
    images: list[ListedImage]
    files: Sequence[str] = ()
    containers: Sequence[Container] = ()


def existing_folder(data_dir: str, expected: str) -> epath.Path:
    """Returns `config.data.dir` as a path; raises UserError if it is no folder.

    `expected` says what the folder should hold, for the message.
    """
    folder = epath.Path(data_dir).expanduser()
    if not data_dir or not folder.is_dir():
        raise UserError(
            f"config.data.dir is {data_dir!r}, which is not a folder; point it at the folder that "
            f"holds {expected}"
        )
    return folder


def one_file(folder: epath.Path, patterns: Sequence[str], kind: str) -> epath.Path:
    """Returns the one file of a folder that matches one of some patterns.

    Raises UserError if there is none, or more than one.
    """
    # Not by `glob`, which takes a [ in the folder's own path for a pattern too.
    with as_user_error(f"{folder}: cannot be listed"):
        there = sorted(folder.iterdir())
    # Hidden files are programs' own, and Excel's are named ~$ while it has a table open.
    seen = [path for path in there if not path.name.startswith((".", "~$"))]
    found = [p for p in seen if any(fnmatch.fnmatchcase(p.name.lower(), one) for one in patterns)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        packed = [path for path in there if path.suffix.lower() in _PACKED and not found]
        told = [f"; {path.name} is there: {_PACKED[path.suffix.lower()]}" for path in packed]
        raise UserError(
            f"{folder}: expected one {' or '.join(patterns)} ({kind}), found {names}{''.join(told)}"
        )
    return found[0]


def image_folder(folder: epath.Path) -> epath.Path:
    """Returns the folder `images` of a dataset's folder, or that itself where there is none."""
    images = folder / "images"
    return images if images.is_dir() else folder


def read_text(path: epath.Path) -> str:
    """Returns the text of a file in UTF-8, or in UTF-16 if a byte order mark says so.

    Raises UserError if it cannot be read, or is in another encoding; it says how to convert it.
    """
    if advice := _PACKED.get(path.suffix.lower()):
        raise UserError(f"{path}: not a text file; {advice}")
    with as_user_error(f"{path}: cannot be read"):
        content = path.read_bytes()
    for start, advice in _SIGNATURES.items():
        if content.startswith(start):
            raise UserError(f"{path}: not a text file, whatever its name says; {advice}")
    try:
        return decoded(content)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line}: not text in UTF-8 (byte {content[error.start]:#04x}). Save it "
            "as UTF-8 ('CSV UTF-8' in Excel), or convert it: iconv -f cp1252 -t utf-8 "
            f"{path.name} > utf8-{path.name}, where cp1252 is Windows' encoding of western Europe"
        ) from error


def decoded(content: bytes) -> str:
    """Returns the text of bytes in UTF-8, or in UTF-16 if a byte order mark says so.

    Raises UnicodeDecodeError if they are none.
    """
    return content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")


def filled_lines(text: str) -> list[str]:
    """Returns the lines that hold anything; they end at line feeds, carriage returns, or both.

    `str.splitlines` would end them at other characters too, which texts may hold, such as U+2028.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip()]


def parse_json(where: str, text: str) -> Any:
    """Returns what a JSON text holds.

    Raises UserError, naming the place, if it is not JSON, or nested too deeply to be a listing.
    """
    with as_user_error(f"{where}: not JSON", errors=(ValueError, RecursionError)):
        return json.loads(text)


def read_json(path: epath.Path) -> Any:
    """Returns what a JSON file holds; raises UserError if it cannot be read or is not one."""
    return parse_json(str(path), read_text(path))


def checked_name(where: str, key: str, name: Any) -> str:
    """Returns what a listing's entry gives, under a key, as the path of an image.

    Raises UserError if it can be no path.
    """
    if not is_text(name) or not name:
        raise UserError(f"{where}: {key!r} is {name!r:.60}; expected an image's path")
    return name


def is_text(value: Any) -> bool:
    """Returns whether a value is text that files and their names can hold."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a character, which JSON can spell
        return False
    return True


def check_text(name: str, value: Any) -> None:
    """Raises UserError unless a value is text that a tokenizer takes: no NUL, no half a character.

    `name` is what messages call it.
    """
    if not isinstance(value, str):
        raise UserError(f"{name}: expected a str, got {type(value).__name__}")
    if not is_text(value):
        raise UserError(
            f"{name} is {value!r:.60}, which has a NUL or half a character; expected text, which a "
            "terminal and a file give in UTF-8"
        )


def same_file(path: AnyImageFile) -> str:
    """Returns one name for all spellings of a path, such as `a.jpg` and `./a.jpg`."""
    return os.path.normpath(os.fspath(path))


def images_of_rows(rows: Iterable[ListedImage]) -> list[ListedImage]:
    """Returns the images of a listing with a row for some of an image's captions each.

    Rows of the same file make one image, however they spell its path, in the order of their first
    rows. Captions are numbered in the rows' order, and images too unless all have numbers.

    Rows are without ids of captions. `source_id` is the path as it is listed, `image_id` the
    listing's own id, a number or text, or None. Raises UserError if an id is none, or rows disagree
    on an image's split or id.
    """
    files: dict[str, str] = {}  # by the paths as listed
    first: dict[str, ListedImage] = {}
    owner: dict[str, ListedImage] = {}  # the first row of each of the listing's own ids
    gathered: dict[str, tuple[list[Any], list[int]]] = {}
    number = 0
    for row in rows:
        name = row.source_id
        file = files.get(name) or files.setdefault(name, same_file(row.path))
        before = first.setdefault(file, row)
        for field in ("split", "image_id"):
            if getattr(row, field) != getattr(before, field):
                raise UserError(
                    f"{row.where}: {field} of {name!r} is {getattr(row, field)!r}, but "
                    f"{getattr(before, field)!r} in {before.where}"
                )
        if row.image_id is not None:
            if not is_text(row.image_id) and not isinstance(row.image_id, int | float):
                raise UserError(
                    f"{row.where}: image_id is {row.image_id!r:.60}; expected a number or text"
                )
            other = owner.setdefault(str(row.image_id), row)
            if files[other.source_id] != file:
                raise UserError(
                    f"{row.where}: the image_id {row.image_id!r} is also that of "
                    f"{other.source_id!r} in {other.where}"
                )
        captions, ids = gathered.setdefault(file, ([], []))
        captions.extend(row.captions)
        ids.extend(range(number, number + len(row.captions)))
        number += len(row.captions)
    own = all(type(row.image_id) is int for row in first.values())
    return [
        dataclasses.replace(
            row,
            image_id=row.image_id if own else image_id,
            captions=gathered[file][0],
            caption_ids=gathered[file][1],
        )
        for image_id, (file, row) in enumerate(first.items())
    ]


def checked_listing(
    name: str,
    where: str,
    files: Sequence[epath.Path],
    images: Iterable[ListedImage],
    advice: str = "",
) -> Listing:
    """Returns a listing whose images, in all splits or in test alone, appear once, with unique ids.

    It is that of some files, `where` for messages, with the images of each split in the source's
    order; `advice` says what to do about a missing split. Raises UserError if something is wrong,
    which names the split, or the two entries that clash.
    """
    images = sorted(images, key=lambda image: SPLITS.index(image.split))
    if not images:
        raise UserError(f"{where}: it lists no image")
    there = {image.split for image in images}
    if there != {"test"}:  # which can be evaluated on
        for split in SPLITS:
            if split not in there:
                raise UserError(f"{where}: no image of the split {split!r}{advice}")
    image_of_id: dict[int, ListedImage] = {}
    image_of_file: dict[str, ListedImage] = {}
    image_of_caption: dict[int, ListedImage] = {}
    for image in images:
        _check_number(image.where, "image id", image.image_id, MAX_IMAGE_ID)
        other = image_of_id.setdefault(image.image_id, image)
        if other is not image:
            raise UserError(
                f"{image.where}: the image id {image.image_id} is also that of {other.where}; "
                "ids must be unique over all splits"
            )
        other = image_of_file.setdefault(same_file(image.path), image)
        if other is not image:
            raise UserError(
                f"{image.where}: the image {image.path} is also that of {other.where}; list each "
                "image once, with all its captions"
            )
        for caption_id in image.caption_ids:
            _check_number(image.where, "id of a caption", caption_id, MAX_CAPTION_ID)
            if caption_id in image_of_caption:
                raise UserError(
                    f"{image.where}: the id of a caption, {caption_id}, already appears in "
                    f"{image_of_caption[caption_id].where}; ids of captions must be unique"
                )
            image_of_caption[caption_id] = image
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return Listing(name, digest.hexdigest()[:12], images, [os.fspath(file) for file in files])


def _check_number(where, what, number, most):
    # JSON's true and false are ints in Python.
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= most:
        raise UserError(
            f"{where}: the {what} is {number!r:.60}; expected a whole number from 0 to {most}"
        )


def usable_captions(image: ListedImage) -> tuple[list[str], list[int], list[Skipped]]:
    """Returns the captions that can be used, their ids, and the others with their reasons."""
    captions, ids, skipped = [], [], []
    for number, (caption, caption_id) in enumerate(
        zip(image.captions, image.caption_ids, strict=True)
    ):
        reason = caption_fault(caption)
        if reason:
            where = f"{image.where}, caption {number}"
            skipped.append(Skipped(where, str(image.path), reason))
        else:
            captions.append(caption)
            ids.append(caption_id)
    return captions, ids, skipped


def caption_fault(caption: Any) -> str:
    """Returns why something cannot be used as a caption, or "" if it can."""
    if not isinstance(caption, str):
        return f"the caption is not text: {caption!r:.60}"
    if not any(_says_something(character) for character in caption):
        return f"the caption is empty: {caption!r:.60}"
    bare = caption.strip().lower()
    if bare in NO_VALUE or _FORMULA_ERROR.fullmatch(bare):
        return f"the caption is {caption!r}, which stands for no value"
    if _LIST.fullmatch(caption):
        return f"the caption is a list written as text: {caption!r:.60}"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return (
            f"the caption is too long: {len(caption)} characters, more than the "
            f"{MAX_CAPTION_CHARACTERS} of a plausible one; it begins {caption[:40]!r}"
        )
    if not is_text(caption):
        return f"the caption is not text: a NUL, or half a character, in {caption!r:.60}"
    return ""


def _says_something(character):
    """Returns whether a character is none of spaces, marks and what cannot be seen."""
    kind = unicodedata.category(character)[0]
    return kind in "LN" or (kind == "S" and not character.isascii())  # pictographs are symbols

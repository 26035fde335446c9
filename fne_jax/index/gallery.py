"""What can be searched: the images of a folder, a table or a split, and their captions or texts."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from PIL import Image

from fne_jax.data.images.usable_images import FORMATS, AnyImage
from fne_jax.data.pairs import SPLITS, PairDataset
from fne_jax.data.sources import listing, pair_tables
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, expand_home, files_below
from fne_jax.index.names import Names

_TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl"}
AnyPath = str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Items to be searched, each known by a name.

    Attributes:
      kind: "images" or "texts".
      where: What holds them, for messages.
      names: The name of each item, each once; of texts, the texts themselves.
      stamps: [items, 2] int64 that differ if an item of the same name is another: size and time of
        change (ns) of a file, -1 where there is none; of a split, its checksum.
      content: Returns an item by its index: an image of any kind, or the text.
      captions: Returns the captions of an item by its index; () where none are known.
      path: Returns the file of an item by its index; "" where there is none.
    """

    kind: str
    where: str
    names: Names
    stamps: np.ndarray
    content: Callable[[int], AnyImage]
    captions: Callable[[int], Sequence[str]] = lambda index: ()
    path: Callable[[int], str] = lambda index: ""

    def some_captions(self, most: int) -> list[str]:
        """Returns captions of so many items at most, evenly spread, one of each that has any."""
        step = max(1, len(self.names) // most)
        found = (self.captions(item) for item in range(0, len(self.names), step))
        return [captions[0] for captions in found if captions][:most]


def images_of(
    source: AnyPath | Sequence[AnyPath], load_split: Callable[[str], PairDataset]
) -> Gallery:
    """Returns the images of a folder, a table, a split, or a list of files.

    Args:
      source: A folder, searched with all folders below it; a table as `config.data.source` csv or
        jsonl reads it; "train", "val" or "test" for a split of the run's dataset (`./test` is a
        folder of that name); or a list of files.
      load_split: Returns a split of the run's dataset by name.

    Raises UserError if it is not one of these, cannot be read, or holds no image.
    """
    if not isinstance(source, AnyPath):
        return _of_files(source)
    if source in SPLITS:
        return _images_of_split(source, load_split(source))
    path = _existing(source, "a folder of images, a table (.csv, .tsv, .jsonl) or a split")
    if path.is_dir():
        return _of_folder(path)
    return _images_of_table(path)


def texts_of(source: AnyPath | Sequence[str], load_split: Callable[[str], PairDataset]) -> Gallery:
    """Returns the captions of a table or a split, the lines of a file, or the given sentences.

    A text that comes several times is there once.

    Args:
      source: A table or a split as for `images_of`; a file of UTF-8 with a sentence a line; or a
        list of sentences.
      load_split: Returns a split of the run's dataset by name.

    Raises UserError if it is not one of these, cannot be read, or holds no text.
    """
    if not isinstance(source, AnyPath):
        where, texts = "the texts given", list(source)
    elif source in SPLITS:
        where, texts = f"the captions of {source}", load_split(source).captions
    else:
        path = _existing(source, "a table (.csv, .tsv, .jsonl), a file of sentences or a split")
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a table, a file of sentences or a split")
        where = str(path)
        if path.suffix.lower() in _TABLES:
            texts = [text for image in _table(path) for text in listing.usable_captions(image)[0]]
        else:
            texts = listing.filled_lines(listing.read_text(epath.Path(path)))
    for row, text in enumerate(texts):
        listing.check_text(f"texts[{row}]", text)
    texts = list(dict.fromkeys(text for text in texts if text.strip()))
    if not texts:
        raise UserError(f"{where}: there is no text")
    names = Names.of(texts)
    return Gallery("texts", where, names, np.zeros((len(names), 2), np.int64), names.__getitem__)


def label_of(source: AnyPath) -> str:
    """Returns a short name for a source, which tells it from others, to name files by."""
    if source in SPLITS:
        return source
    path = pathlib.Path(os.path.realpath(source))  # pathlib fails over links in a circle
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in path.stem)[:40]
    return f"{plain}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def _existing(source, expected):
    path = pathlib.Path(expand_home(source))
    with as_user_error(f"{path}: cannot be read"):  # a folder on the way may not be
        there = path.exists()
    if not there:
        raise UserError(
            f"{os.fspath(source)!r} does not exist; expected {expected} ({', '.join(SPLITS)})"
        )
    return path


def _image_suffixes():
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def _of_folder(folder):
    suffixes = _image_suffixes()
    names, stamps = [], []
    with as_user_error(f"{folder}: cannot be listed"):
        for path in files_below(folder):
            if os.path.splitext(path)[1].lower() in suffixes:
                stamp = _stamp(path)
                if stamp[0] >= 0:
                    names.append(os.path.relpath(path, folder))
                    stamps.append(stamp)
    if not names:
        raise UserError(
            f"{folder}: there is no image in it or in the folders below; files are taken for "
            f"images by their endings ({', '.join(sorted(suffixes))})"
        )
    order = sorted(range(len(names)), key=names.__getitem__)
    return _files(str(folder), [names[n] for n in order], [stamps[n] for n in order], folder)


def _of_files(paths):
    names = list(dict.fromkeys(os.path.abspath(expand_home(path)) for path in paths))
    if not names:
        raise UserError("there are no images in the list")
    return _files("the files given", names, [_stamp(name) for name in names], "")


def _files(where, names, stamps, folder, captions=None):
    """Returns the gallery of files by their paths, which may be relative to a folder."""
    names, stamps = Names.of(names), np.array(stamps, np.int64)

    def path(index):
        return os.path.join(folder, names[index])

    more = {} if captions is None else {"captions": captions.__getitem__}
    return Gallery("images", where, names, stamps, path, path=path, **more)


def _stamp(path):
    """Returns the size and the time of change of a file; (-1, 0) for one that does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a link to nowhere; a NUL in a list's name
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _table(path):
    return pair_tables.read_images(epath.Path(path), _TABLES[path.suffix.lower()])


def _images_of_table(path):
    if path.suffix.lower() not in _TABLES:
        raise UserError(
            f"{path} is a file; expected a folder of images, a table ({', '.join(_TABLES)}) or a "
            f"split ({', '.join(SPLITS)}). To search by an image, give it as --image"
        )
    images, folder = _table(path), str(path.parent)
    if not images:
        raise UserError(f"{path}: there is no image")
    files = [os.fspath(image.path) for image in images]
    names = [os.path.normpath(os.path.relpath(file, folder)) for file in files]
    # A path that leads out of the folder is as well given whole.
    names = [
        os.path.abspath(file) if name.startswith("..") else name
        for name, file in zip(names, files, strict=True)
    ]
    captions = [listing.usable_captions(image)[0] for image in images]
    return _files(str(path), names, [_stamp(f) for f in files], folder, captions)


def _images_of_split(name, dataset):
    source = dataset.source_image_id
    names = source if len(set(source)) == len(source) else [str(n) for n in dataset.image_id]
    captions = [[] for _ in names]
    for row, caption in zip(dataset.caption_image, dataset.captions, strict=True):
        captions[row].append(caption)
    return Gallery(
        "images",
        f"the split {name}",
        Names.of(names),
        np.full((len(names), 2), np.array(int(dataset.identity.checksum, 16), "u8").view("i8")),
        dataset.image,
        captions.__getitem__,
        (lambda index: "") if dataset.in_memory else dataset.images.source_file,
    )

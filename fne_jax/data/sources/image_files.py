"""Where the bytes of a listed image come from: a file, or what makes them when they are read."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import errno
import hashlib
import os
import stat
import unicodedata
from collections.abc import Sequence

import fsspec
from etils import epath

from fne_jax.errors import UserError

Stamp = tuple[int, int]  # bytes, and time of modification in nanoseconds; (-1, 0) for no file
# What says that there is no file, beside that it or a folder is missing: links in a circle, and a
# name that no file can have. Other errors, such as those of a network, say nothing of the file.
_NO_FILE = (errno.ELOOP, errno.ENAMETOOLONG)
_CHANGED = ("mtime", "LastModified", "updated", "created", "ETag")
_STAMP_THREADS = 32  # for remote files, whose stamps take a round trip each
_STAMPED_AT_A_TIME = 256


@dataclasses.dataclass(frozen=True)
class MadeImage(abc.ABC):
    """An image that is made when it is read, and lies in no file.

    Equal images have the same name; the size is an estimate of its bytes.
    """

    name: str
    size: int

    def __fspath__(self) -> str:
        """Returns the name in the place of a path."""
        return f"/{self.name}"

    @abc.abstractmethod
    def read(self) -> bytes:
        """Returns the image's bytes."""


AnyImageFile = str | os.PathLike | MadeImage


def read_bytes(image: AnyImageFile) -> bytes:
    """Returns the content of an image's file; raises OSError if it cannot be read."""
    return image.read() if isinstance(image, MadeImage) else epath.Path(image).read_bytes()


def file_of(image: AnyImageFile) -> str:
    """Returns the path of an image's file; "" if the image is made."""
    return "" if isinstance(image, MadeImage) else os.fspath(image)


def stamps_of(images: Sequence[AnyImageFile]) -> list[Stamp]:
    """Returns the stamp of each image, see `stamp_of`."""
    chunk = _STAMPED_AT_A_TIME
    parts = (images[start : start + chunk] for start in range(0, len(images), chunk))
    with concurrent.futures.ThreadPoolExecutor(_STAMP_THREADS) as pool:
        stamps = pool.map(lambda part: [stamp_of(image) for image in part], parts)
        return [stamp for part in stamps for stamp in part]


def stamp_of(image: AnyImageFile) -> Stamp:
    """Returns the bytes of an image and when its file was modified (ns), or (-1, 0) for no file.

    Raises UserError if the file system does not tell whether there is a file.
    """
    if isinstance(image, MadeImage):
        return image.size, 0
    name = os.fspath(image)
    try:
        if "://" in name:
            system, path = fsspec.core.url_to_fs(name)
            info = system.info(path)
            # Each file system tells by another name when a file was changed, or only that it was.
            changed = [str(info[key]) for key in _CHANGED if key in info]
            digest = hashlib.sha256(" ".join(changed).encode()).digest()
            return info["size"], int.from_bytes(digest[:6], "big")
        # epath's own gives whole seconds, and fails where the file's owner has no name.
        local = os.stat(name)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno in _NO_FILE:
            return -1, 0
        raise UserError(f"{name}: cannot be read: {error}; fix that and try again") from error
    return (local.st_size, local.st_mtime_ns) if stat.S_ISREG(local.st_mode) else (-1, 0)


def likely_reason(name: str) -> str:
    """Returns what is likely wrong with the path of a file that does not exist; "" if not known."""
    if "http:/" in name or "https:/" in name:
        return "; it is a URL: download the image and list its file"
    if "/~" in name:
        return "; write ~ out as the home folder"
    unicode_form = "in another Unicode form (NFC, or NFD as on a Mac)"
    spellings = {
        name.replace("\\", "/"): "with / in place of \\",
        name.strip(): "without the spaces around its name",
        unicodedata.normalize("NFC", name): unicode_form,
        unicodedata.normalize("NFD", name): unicode_form,
    }
    for other, how in spellings.items():
        if other != name and os.path.isfile(other):
            return f"; there is one {how}: {other!r}"
    return ""

"""All images of a dataset checked on all cores, a part at a time, so that nothing is done twice.

A part is a zip file in a scratch folder: `outcomes.json`, one entry an image, and the images that
had to be converted. It appears whole or not at all; a later call takes it up, and looks again only
at images that were refused or have changed since.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import hashlib
import io
import json
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence

from etils import epath
from PIL import Image

from fne_jax import files
from fne_jax.data.images.usable_images import UnusableImage, usable_jpeg
from fne_jax.data.sources.listing import ListedImage
from fne_jax.errors import UserError
from fne_jax.progress import Progress

IMAGES_PER_PART = 256
# Part of the identity of parts and of prepared datasets: another number where images are judged or
# converted otherwise, so that nothing is taken up that was made by other rules.
RULES = 2
_OUTCOMES = "outcomes.json"
# What says that there is no file, beside that it or a folder is missing: links in a circle, and a
# name that no file can have. Other errors, such as those of a network, say nothing of the file.
_NO_FILE = (errno.ELOOP, errno.ENAMETOOLONG)
_STAMP_THREADS = 32  # most of all for remote files, whose stamps take a round trip each


@dataclasses.dataclass(frozen=True)
class CheckedImage:
    """What came of one image.

    Attributes:
      size: The bytes of the file, -1 where there is none.
      modified: The time of the file's modification in nanoseconds.
      digest: The SHA-256 of the JPEG to store, "" where there is none.
      converted: Whether that JPEG is another than the file itself.
      reason: Why the image cannot be used, "" where it can.
    """

    size: int
    modified: int
    digest: str
    converted: bool
    reason: str


class CheckedParts:
    """The checked images of a dataset.

    Args:
      images: All images, in the order of the records.
      scratch: The folder for the parts, kept from call to call.
      resize_to: The pixels that the shorter side of an image is reduced to where it is longer, or 0
        to leave the size.
    """

    def __init__(self, images: Sequence[ListedImage], scratch: epath.Path, resize_to: int):
        self._images, self._scratch, self._resize_to = images, scratch, resize_to
        self._starts = range(0, len(images), IMAGES_PER_PART)

    def check(self) -> list[CheckedImage]:
        """Returns what came of each image, from parts that are there or are made now.

        Raises:
          UserError: If a file is there but cannot be read, which says nothing of the image.
        """
        self._scratch.mkdir(parents=True, exist_ok=True)
        Image.init()  # PIL loads its formats on first use, which must not happen in many threads
        outcomes: dict[int, list[CheckedImage]] = {}
        # Threads: PIL lets go of the interpreter while it decodes, resizes and encodes.
        pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        with Progress("checking images", len(self._images)) as progress:
            try:
                waiting = {pool.submit(self._check_part, start): start for start in self._starts}
                for done in concurrent.futures.as_completed(waiting):
                    outcomes[waiting[done]] = done.result()
                    progress.advance(len(done.result()))
            finally:
                pool.shutdown(cancel_futures=True)
        return [outcome for start in self._starts for outcome in outcomes[start]]

    def jpegs(self) -> Iterator[bytes]:
        """Yields the JPEG of every image, b"" of those refused, after `check`.

        Raises:
          UserError: If an image has changed since it was checked.
        """
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in self._starts:
                images = self._images[start : start + IMAGES_PER_PART]
                outcomes, converted = self._read_part(start)
                paths = [image.path for image in images]
                jpegs = pool.map(_stored_jpeg, paths, outcomes, converted)
                for path, outcome, jpeg in zip(paths, outcomes, jpegs, strict=True):
                    if not jpeg and not outcome.reason:
                        self._part(start).unlink()
                        raise UserError(
                            f"{path}: has changed since it was checked; run the same command again"
                        )
                    yield jpeg

    def _part(self, start):
        return self._scratch / f"part-{start // IMAGES_PER_PART:05}.zip"

    def _check_part(self, start):
        images = self._images[start : start + IMAGES_PER_PART]
        try:
            old, converted = self._read_part(start)
        # Not there yet, damaged, or of another version.
        except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error):
            checked = [_check_image(image.path, self._resize_to) for image in images]
            return self._write_part(start, checked)
        checked, changed = [], False
        for image, outcome, jpeg in zip(images, old, converted, strict=True):
            if outcome.reason or (outcome.size, outcome.modified) != file_stamp(image.path):
                outcome, jpeg = _check_image(image.path, self._resize_to)
                changed = True
            checked.append((outcome, jpeg))
        return self._write_part(start, checked) if changed else old

    def _write_part(self, start, checked):
        stream = io.BytesIO()
        outcomes = [outcome for outcome, _ in checked]
        with zipfile.ZipFile(stream, "w") as archive:
            entries = [dataclasses.asdict(outcome) for outcome in outcomes]
            archive.writestr(_OUTCOMES, json.dumps(entries))
            for number, (outcome, jpeg) in enumerate(checked):
                if outcome.converted:
                    archive.writestr(f"{number}.jpg", jpeg)
        files.write_atomically(self._part(start), stream.getvalue())
        return outcomes

    def _read_part(self, start):
        """Returns a part's outcomes and JPEGs, b"" of those that are the files themselves."""
        with zipfile.ZipFile(io.BytesIO(self._part(start).read_bytes())) as archive:
            outcomes = [CheckedImage(**entry) for entry in json.loads(archive.read(_OUTCOMES))]
            return outcomes, [
                archive.read(f"{number}.jpg") if outcome.converted else b""
                for number, outcome in enumerate(outcomes)
            ]


def file_stamp(path: epath.Path) -> tuple[int, int]:
    """Returns the bytes of a file and when it was modified (ns), or (-1, 0) if there is none.

    Raises:
      UserError: If the file system does not tell whether there is one.
    """
    name = os.fspath(path)
    try:
        if "://" in name:
            remote = path.stat()
            return remote.length, int(remote.mtime) * 10**9
        # epath's own gives whole seconds, and fails where the file's owner has no name.
        local = os.stat(name)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno in _NO_FILE:
            return -1, 0
        raise UserError(f"{name}: cannot be read: {error}; fix that and try again") from error
    return (local.st_size, local.st_mtime_ns) if stat.S_ISREG(local.st_mode) else (-1, 0)


def digest_of_files(images: Sequence[ListedImage], *, with_stamps: bool) -> str:
    """Returns 16 hexadecimal digits that stand for where images lie and by which rules they go.

    Args:
      images: All images, in the order of the records.
      with_stamps: Whether they stand for the files' stamps as well.
    """
    digest = hashlib.sha256(str(RULES).encode())
    paths = [image.path for image in images]
    for path in paths:
        name = os.fspath(path)
        digest.update(repr(name if "://" in name else os.path.abspath(name)).encode())
    if with_stamps:
        parts = [paths[i : i + IMAGES_PER_PART] for i in range(0, len(paths), IMAGES_PER_PART)]
        with concurrent.futures.ThreadPoolExecutor(_STAMP_THREADS) as pool:
            for stamps in pool.map(lambda part: [file_stamp(path) for path in part], parts):
                digest.update("".join(map(repr, stamps)).encode())
    return digest.hexdigest()[:16]


def _stored_jpeg(path, outcome, converted):
    """Returns the JPEG of an image, b"" where there is none or the file is another by now."""
    if outcome.reason or outcome.converted:
        return converted
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    return content if hashlib.sha256(content).hexdigest() == outcome.digest else b""


def _check_image(path, resize_to):
    """Returns the outcome and, if the image was converted, its JPEG."""
    size, modified = file_stamp(path)
    try:
        if size < 0:
            raise UnusableImage(f"there is no image {path}")
        with files.as_user_error(f"{path}: cannot be read", "fix that and try again"):
            content = path.read_bytes()
        jpeg = usable_jpeg(content, resize_to)
    except UnusableImage as fault:
        return CheckedImage(size, modified, "", False, str(fault)), b""
    outcome = CheckedImage(size, modified, hashlib.sha256(jpeg).hexdigest(), jpeg != content, "")
    return outcome, jpeg if outcome.converted else b""

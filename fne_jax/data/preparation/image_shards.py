"""Shards of images: each checked, converted and written by itself, in whatever process.

A shard becomes two files that are named by its key, a digest of its images' names, sizes and times
of modification: `KEY.array_record` with the JPEGs, and `KEY.json` with an outcome for each image,
which appears last. A shard of unchanged images is never made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

from fne_jax import files
from fne_jax.data.images.usable_images import UnusableImage, usable_jpeg
from fne_jax.data.sources.image_files import (
    AnyImageFile,
    Stamp,
    likely_reason,
    read_bytes,
    stamp_of,
    stamps_of,
)
from fne_jax.data.sources.listing import ContainedImage, Container, ListedImage
from fne_jax.errors import EnvironmentFailure, UserError, first_line

# A shard of listed images is full at the first of these.
IMAGES_PER_SHARD = 4096
BYTES_PER_SHARD = 256 * 2**20  # of the images' files
# Part of each key: another number where images are judged or converted otherwise, so that nothing
# is taken up that was made by other rules.
RULES = 3


class Stopped(Exception):
    """A shard is given up, since the command ends."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one image.

    Attributes:
      digest: The SHA-256 of the stored JPEG, "" where there is none.
      reason: Why the image cannot be used, "" where it can.
      listed: The image as its container lists it; None where the listing has it.
    """

    digest: str
    reason: str
    listed: ContainedImage | None = None


@dataclasses.dataclass(frozen=True)
class ImageShard:
    """Images that are written to a file of their own.

    Attributes:
      key: 32 hexadecimal digits that stand for what the shard is made of.
      contents: What the images are read from: listed files with their stamps, or a container.
      resize_to: The pixels that the shorter side of an image is reduced to where it is longer, or 0
        to store images as they are.
    """

    key: str
    contents: Sequence[tuple[AnyImageFile, Stamp]] | Container
    resize_to: int

    def records_in(self, folder: pathlib.Path) -> pathlib.Path:
        """Returns the file of the JPEGs in a folder."""
        return folder / f"{self.key}.array_record"

    def outcomes_in(self, folder: pathlib.Path) -> pathlib.Path:
        """Returns the file of the outcomes in a folder."""
        return folder / f"{self.key}.json"

    def is_made(self, folder: pathlib.Path, records: pathlib.Path | None = None) -> bool:
        """Returns whether a folder has outcomes that can be read, and there are the records.

        `records` is the file of the JPEGs where it has another name than `records_in` gives it.
        """
        try:
            self.outcomes(folder)
        except UserError:
            return False
        return (records or self.records_in(folder)).exists()

    def outcomes(self, folder: pathlib.Path) -> list[Outcome]:
        """Returns what came of each image; raises UserError if the file is damaged."""
        path = self.outcomes_in(folder)
        with files.as_user_error(f"{path}: is damaged", errors=(OSError, ValueError, TypeError)):
            outcomes = [
                Outcome(digest, reason, listed and ContainedImage(*listed))
                for digest, reason, listed in json.loads(path.read_text())
            ]
            sizes = [
                len(bytes.fromhex(one.digest)) == (0 if one.reason else 32) for one in outcomes
            ]
            counted = isinstance(self.contents, Container) or len(sizes) == len(self.contents)
            if not counted or not all(sizes):
                raise ValueError("it has not one outcome for each image")
            return outcomes


def plan_shards(
    images: Iterable[ListedImage],
    stamps: Iterable[Stamp],
    containers: Iterable[Container],
    resize_to: int,
) -> list[ImageShard]:
    """Returns the shards of a listing: of its images up to a split's end or full, and of each file.

    An image that is added to the end of a split leaves all but the last shard of it as they were.
    `stamps` are of the images, and `resize_to` as of `ImageShard`.
    """
    shards: list[ImageShard] = []
    part: list[tuple[AnyImageFile, Stamp]] = []
    split, size = None, 0

    def add(contents, told):
        digest = hashlib.sha256(f"{RULES} {resize_to}".encode())
        for one in told:
            digest.update(repr(one).encode())
        shards.append(ImageShard(digest.hexdigest()[:32], contents, resize_to))

    def close():
        if part:
            add(part, ((os.path.abspath(image), stamp) for image, stamp in part))

    for image, stamp in zip(images, stamps, strict=True):
        full = len(part) == IMAGES_PER_SHARD or size + stamp[0] > BYTES_PER_SHARD
        if full or image.split != split:
            close()
            part, split, size = [], image.split, 0
        part.append((image.path, stamp))
        size += stamp[0]
    close()
    for container in containers:
        add(container, [container, stamp_of(container.file), *stamps_of(container.outside())])
    return shards


def write_shard(
    shard: ImageShard, folder: pathlib.Path, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Checks and converts a shard's images, one at a time, and writes those that can be used.

    `stopped` is asked before each image; once it is true, the shard is given up.

    Raises:
      EnvironmentFailure: If the records cannot be written.
      OSError: If the outcomes cannot.
      Stopped: If it was given up.
      UserError: If an image's file is there but cannot be read, which says nothing of the image, or
        has changed since its stamp was taken.
    """
    # Kept out of the module's imports: TensorFlow takes seconds to import.
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    from fne_jax.data.preparation.storage import image_features

    encode = tfds.features.FeaturesDict(image_features()).serialize_example
    path = shard.records_in(folder)
    outcomes = []
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    try:
        for listed, read in _contents(shard):
            if stopped():
                raise Stopped
            try:
                jpeg, reason = usable_jpeg(read(), shard.resize_to), ""
                writer.write(encode({"image": jpeg}))
            except UnusableImage as fault:
                jpeg, reason = b"", str(fault)
            digest = hashlib.sha256(jpeg).hexdigest() if jpeg else ""
            outcomes.append((digest, reason, listed))
        writer.close()
    except RuntimeError as error:  # of ArrayRecord, where the disk is full
        raise EnvironmentFailure(
            f"{path}: cannot be written: {first_line(error)}; make room, or give another "
            "config.data.cache_dir"
        ) from error
    finally:
        with contextlib.suppress(RuntimeError):  # once more, of the full disk
            if writer.is_open():
                writer.close()
    # What JSON has no word for, such as bytes in the place of a caption, is no text either way.
    told = json.dumps(outcomes, default=lambda value: {type(value).__name__: repr(value)})
    files.write_atomically(shard.outcomes_in(folder), told)


def _contents(shard):
    """Yields for each image how its container lists it, if one does, and what reads its bytes."""
    if isinstance(shard.contents, Container):
        for listed, content in shard.contents.images():
            yield listed, functools.partial(_contained, content)
        return
    for image, stamp in shard.contents:
        yield None, functools.partial(_read, image, stamp)


def _contained(content):
    if content is None:
        raise UnusableImage("there is no image beside the caption")
    return content


def _read(image, stamp):
    name = os.fspath(image)
    if stamp[0] < 0:
        raise UnusableImage(f"there is no image {name}{likely_reason(name)}")
    with files.as_user_error(f"{name}: cannot be read", "fix that and try again"):
        content = read_bytes(image)
    if stamp_of(image) != stamp:
        raise UserError(f"{name}: has changed since it was listed; run the same command again")
    return content

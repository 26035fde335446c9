"""`webdataset`: tars of images and captions, as webdataset and img2dataset write them.

Members of one name but for the ending belong together: `0001.jpg` with `0001.txt` or `0001.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import ml_collections

from fne_jax.data.sources import listing, many_files
from fne_jax.data.sources.listing import ContainedImage, Container, Listing
from fne_jax.errors import UserError
from fne_jax.files import as_user_error

_MOST_BYTES = 2**30  # of a member, which is held in memory
ENDINGS = (".tar",)
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def read_listing(data: ml_collections.ConfigDict) -> Listing:
    """Returns the tars that `config.data.dir` names.

    It is a folder of tars, or a pattern such as `DIR/{train,val}-{000..009}.tar` or
    `s3://BUCKET/*.tar`; `caption_key` is the key of a JSON member that holds the caption, or a list
    of them. Raises UserError if there is no tar, or only some of their names tell a split.
    """
    tars = [
        Tar(path, split, data.caption_key)
        for path, split in many_files.splits_of(many_files.named_by(data.dir, ENDINGS)).items()
    ]
    return Listing("webdataset", "", [], containers=tars)


@dataclasses.dataclass(frozen=True)
class Tar(Container):
    """A tar of images and captions, those in JSON members under a key."""

    caption_key: str

    def images(self) -> Iterator[tuple[ContainedImage, bytes | None]]:
        """Yields the images with their bytes; None for a caption without an image."""
        sample: dict[str, bytes] = {}
        before, seen = None, set()
        with (
            as_user_error(f"{self.file}: is damaged", errors=(tarfile.TarError, OSError, EOFError)),
            fsspec.open(self.file, "rb") as file,
            # In one pass, as a stream from elsewhere allows no other, packed or not.
            tarfile.open(fileobj=file, mode="r|*", errors="backslashreplace") as tar,
        ):
            for member in tar:
                if member.islnk() or member.issym():
                    raise UserError(
                        f"{self.file}: the member {member.name} is a link, which holds nothing; "
                        "make the tar with --dereference --hard-dereference"
                    )
                if not member.isfile() or os.path.basename(member.name).startswith("."):
                    continue
                folder, base = os.path.split(member.name)
                base, _, ending = base.partition(".")
                name = os.path.join(folder, base)
                if name != before:
                    if before is not None:
                        yield self._image(before, sample)
                    if name in seen:
                        raise UserError(
                            f"{self.file}: the members {name}.* lie apart; sort the tar by name"
                        )
                    seen.add(name)
                    before, sample = name, {}
                ending = ending.lower()
                if ending in sample:
                    raise UserError(f"{self.file}: the member {member.name} appears twice")
                if member.size > _MOST_BYTES:
                    raise UserError(
                        f"{self.file}: the member {member.name} has {member.size:,} bytes; "
                        f"expected images and captions of at most {_MOST_BYTES:,}"
                    )
                content = tar.extractfile(member)
                assert content is not None
                sample[ending] = content.read()
        if before is None:
            raise UserError(f"{self.file}: holds no file")
        yield self._image(before, sample)

    def _image(self, name: str, sample: dict[str, bytes]) -> tuple[ContainedImage, bytes | None]:
        content = next((sample[ending] for ending in _IMAGES if ending in sample), None)
        return ContainedImage(name, f"{self.file}: {name}", self._captions(sample)), content

    def _captions(self, sample: dict[str, bytes]) -> Sequence[Any]:
        """Returns the lines of the text; without one, what the JSON holds."""
        if "txt" in sample:
            try:
                return listing.filled_lines(listing.decoded(sample["txt"]))
            except UnicodeDecodeError:
                return [{"not UTF-8": repr(sample["txt"][:40])}]  # which is told as no text
        try:
            captions = json.loads(sample["json"])[self.caption_key]
        except (KeyError, ValueError, TypeError, RecursionError):
            return []
        return captions if isinstance(captions, list) else [captions]

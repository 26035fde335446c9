"""Preparing what `config.data` describes: captioned images on disk, or scenes to be rendered."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import ml_collections
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from fne_jax import files
from fne_jax.data.pairs import SPLITS
from fne_jax.data.preparation.checking import CheckedImage, CheckedParts, digest_of_files
from fne_jax.data.preparation.storage import PairBuilder
from fne_jax.data.sources.listing import ListedImage, Listing, Skipped, usable_captions
from fne_jax.data.sources.registry import find_source
from fne_jax.errors import UserError
from fne_jax.progress import Progress

SKIPPED_FILE = "skipped.json"
SOURCE_FILES_FILE = "source_files.json"  # the images' files by split, in the records' order
# Kept beside the prepared datasets while one is being built.
SCRATCH_FOLDER = "unfinished"
_SHOWN = 5
_NAME_LENGTH = 60


def prepared_builder(data: ml_collections.ConfigDict) -> PairBuilder:
    """Returns the TFDS builder of the dataset that `config.data` describes, prepared.

    Args:
      data: The group `config.data`, whose source is listed or rendered.

    Raises:
      UserError: If the source cannot be read, or more of it cannot be used than
        `config.data.max_skipped` allows.
    """
    # TensorFlow reads data on the host alone; the accelerator's memory is JAX's.
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")
    cache = epath.Path(data.cache_dir).expanduser()
    source = find_source(data.source)
    if source.read is None:
        builder = source.builder(data, cache)
    else:
        config = CaptionedImagesConfig(
            listing=source.read(data.dir), resize_to=data.resize_to, max_skipped=data.max_skipped
        )
        builder = CaptionedImages(data_dir=cache, config=config)
    with files.as_user_error(f"config.data.cache_dir is {data.cache_dir!r}"):
        builder.prepare()
    return builder


@dataclasses.dataclass(kw_only=True)
class CaptionedImagesConfig(tfds.core.BuilderConfig):
    """What the dataset is made of; anything else of it is another dataset.

    The name holds a digest of the listing and of each image's path, size and time of modification,
    so that images that were mended, changed, moved or deleted are never served as they were.

    Attributes:
      listing: The images and the captions as the source lists them.
      resize_to: The pixels that the shorter side of an image is reduced to where it is longer, or 0
        to store images as they are.
      max_skipped: The largest number of images and captions that may be left out.
      scratch_name: The name of the folder for what is checked, which outlives changes of single
        images: each is looked at again for itself.
    """

    listing: Listing = dataclasses.field(repr=False, compare=False)
    resize_to: int = 0
    max_skipped: int = 0
    name: str = dataclasses.field(init=False)
    scratch_name: str = dataclasses.field(init=False)

    def __post_init__(self):
        images = self.listing.images
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", self.listing.name)[:_NAME_LENGTH]
        size = f"-{self.resize_to}px" if self.resize_to else ""
        named = f"{name}-{self.listing.digest}"
        self.name = f"{named}-{digest_of_files(images, with_stamps=True)}{size}"
        self.scratch_name = f"{named}-{digest_of_files(images, with_stamps=False)}{size}"


class CaptionedImages(PairBuilder, skip_registration=True):
    """Packs checked images as JPEGs with their captions."""

    name = "captioned_images"
    builder_config: CaptionedImagesConfig

    def extra_features(self) -> dict[str, Any]:
        """Returns the feature by which the source itself knows an image."""
        return {"source_id": tfds.features.Text()}

    def extra_files(self) -> dict[str, str]:
        """Returns the list of what was left out, and that of the files that the records hold."""
        files_of = {split: [path for path, _ in kept] for split, kept in self._entries.items()}
        return {SKIPPED_FILE: _skipped_text(self._skipped), SOURCE_FILES_FILE: json.dumps(files_of)}

    def source_file(self, split: str, index: int) -> str:
        """Returns the file that a record of the prepared dataset was made of, "" if not known."""
        try:
            text = (epath.Path(self.data_dir) / SOURCE_FILES_FILE).read_text()
            return json.loads(text)[split][index]
        except (OSError, ValueError, LookupError):  # the record's own damage is what is reported
            return ""

    def sizes(self) -> dict[str, int]:
        """Checks all images and captions, and returns how many images can be used.

        Raises:
          UserError: If more would be left out than the config allows, or all of a split.
        """
        config, scratch = self.builder_config, self._scratch()
        listing, images = scratch / SKIPPED_FILE, config.listing.images
        parts = CheckedParts(images, scratch, config.resize_to)
        kept, self._skipped = _usable(images, parts.check())
        files.write_atomically(listing, _skipped_text(self._skipped))
        _check_skipped(self._skipped, config.max_skipped, listing)
        self._entries = {split: [] for split in SPLITS}
        for image, entry in zip(images, kept, strict=True):
            if entry is not None:
                self._entries[image.split].append((str(image.path), entry))
        for split, entries in self._entries.items():
            if not entries:
                of_split = {str(image.path) for image in config.listing.split(split)}
                shown = _shown([one for one in self._skipped if one.image in of_split])
                raise UserError(
                    f"no image of the split {split!r} can be used:{shown}\n"
                    f"All are listed in {listing}."
                )
        jpegs = zip(kept, parts.jpegs(), strict=True)
        self._jpegs = (jpeg for entry, jpeg in jpegs if entry is not None)
        self._progress = Progress("writing records", len(images))
        return {split: len(entries) for split, entries in self._entries.items()}

    def records(self, split: str, rows: range) -> Iterator[dict[str, Any]]:
        """Yields the next records, in the listing's order."""
        with self._progress as progress:
            for _, entry in self._entries[split][rows.start : rows.stop]:
                yield {"image": next(self._jpegs)} | entry
                progress.advance()

    def prepare(self) -> None:
        """Writes the dataset unless it is there, and removes what was kept for resuming.

        Raises:
          OSError: If it cannot be written.
          UserError: If more was left out than the config allows.
        """
        super().prepare()
        if self._scratch().exists():
            self._scratch().rmtree()
        _check_skipped(self.skipped(), self.builder_config.max_skipped, self.skipped_path())

    def skipped(self) -> list[Skipped]:
        """Returns what was left out of the prepared dataset."""
        return [Skipped(**entry) for entry in json.loads(self.skipped_path().read_text())]

    def skipped_path(self) -> epath.Path:
        """Returns where the list of what was left out lies."""
        return epath.Path(self.data_dir) / SKIPPED_FILE

    def _scratch(self):
        return self.data_dir_root / SCRATCH_FOLDER / self.builder_config.scratch_name


def _check_skipped(skipped: list[Skipped], allowed: int, listing: epath.Path) -> None:
    """Raises UserError, which shows the first few and their number, if too much is left out."""
    if len(skipped) <= allowed:
        return
    raise UserError(
        f"{len(skipped)} images or captions cannot be used, more than config.data.max_skipped, "
        f"{allowed}:{_shown(skipped)}\nAll are listed in {listing}. Fix them, or allow that many "
        "to be left out."
    )


def _shown(skipped):
    """Returns the first few reasons, a line each, and the number of the others."""
    more = len(skipped) - _SHOWN
    lines = [f"\n  {one.where}: {one.reason}" for one in skipped[:_SHOWN]]
    return "".join(lines) + (f"\n  and {more} more" if more > 0 else "")


def _usable(images: list[ListedImage], outcomes: list[CheckedImage]):
    """Returns for each image the record without its JPEG, or None, and what is left out."""
    kept: list[dict[str, Any] | None] = []
    skipped: list[Skipped] = []
    for image, outcome in zip(images, outcomes, strict=True):
        captions, ids, bad_captions = usable_captions(image)
        reason = outcome.reason
        if not reason:
            skipped += bad_captions
            if not captions:
                reason = "no caption is left" if bad_captions else "the list of captions is empty"
        if reason:
            skipped.append(Skipped(image.where, str(image.path), reason))
            kept.append(None)
            continue
        kept.append(
            {
                "image_id": image.image_id,
                "captions": captions,
                "caption_ids": ids,
                "source_id": image.source_id,
            }
        )
    return kept, skipped


def _skipped_text(skipped):
    return json.dumps([dataclasses.asdict(one) for one in skipped], indent=2) + "\n"

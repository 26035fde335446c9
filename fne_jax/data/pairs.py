"""Splits as the training loop sees them: captions, the image of each, and access to the images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fne_jax.data.feature_rows import FeatureRows
from fne_jax.data.identity import DatasetIdentity, checksum_of_set
from fne_jax.data.sources.shapes_scenes import SceneTruth

SPLITS = ("train", "val", "test")
_BLOCK = 4096  # captions that are digested at a time


@dataclasses.dataclass(frozen=True)
class PairDataset:
    """One split. A pair is a caption and its image, and its id is the caption's index.

    Attributes:
      captions: The [pairs] raw captions.
      caption_image: The [pairs] int32 indices of the captions' images.
      image_id: The [images] int32 ids of the images, unique over all splits; COCO's own for COCO.
      images: The [images, side, side, 3] uint8 pixels in memory, or a random-access source of
        records whose `image` is a JPEG.
      caption_id: The [pairs] int64 ids of the captions; COCO's own (its annotations') for COCO.
      source_image_id: The [images] paths by which the source lists the images, or its own numbers.
      truth: The matches beyond the labelled ones, or None where they are not known.
      kept: What the frozen part of a tower makes of its items, by the tower's name: of each image
        ("image") or of each caption ("text"). Where it is there, it is read in their place.
    """

    captions: Sequence[str]
    caption_image: np.ndarray
    image_id: np.ndarray
    images: np.ndarray | Sequence[dict[str, Any]]
    caption_id: np.ndarray
    source_image_id: Sequence[str]
    truth: SceneTruth | None = None
    kept: Mapping[str, FeatureRows] = dataclasses.field(default_factory=dict)

    @property
    def in_memory(self) -> bool:
        """Whether `images` are pixels."""
        return isinstance(self.images, np.ndarray)

    def image(self, index: int) -> bytes | np.ndarray:
        """Returns an image's JPEG, or its [side, side, 3] uint8 pixels."""
        return self.images[index] if self.in_memory else self.images[index]["image"]

    @property
    def image_names(self) -> list[str]:
        """The [images] names by which files about a split tell that its images are the same."""
        return [portable_name(name) for name in self.source_image_id]

    @functools.cached_property
    def identity(self) -> DatasetIdentity:
        """What the split holds; of a prepared one, the images' checksum was stored with them."""
        digest = hashlib.sha256()
        if self.in_memory:
            pixels = np.ascontiguousarray(self.images)
            digest.update(f"{pixels.dtype} {pixels.shape}".encode())
            digest.update(pixels)
            images = checksum_of_set(pixels)
        else:
            digest.update(self.images.checksum.encode())
            names = map(portable_name, self.source_image_id)
            images = checksum_of_set(name.encode(errors="surrogatepass") for name in names)
        digest.update(b"[")  # of captions as a JSON list, which would be as large as all of them
        for start in range(0, len(self.captions), _BLOCK):
            text = json.dumps(self.captions[start : start + _BLOCK])[1:-1]
            digest.update(f"{', ' if start else ''}{text}".encode())
        digest.update(b"]")
        for ids in (self.caption_image, self.image_id, self.caption_id):
            digest.update(np.ascontiguousarray(ids, np.int64))
        return DatasetIdentity(
            len(self.captions), len(self.images), digest.hexdigest()[:16], images
        )


def portable_name(name: str) -> str:
    """Returns what stays of the name of an image when its file is moved with the dataset.

    Of a file outside the dataset's folder that is the last part of its path alone.
    """
    return posixpath.basename(name) if name.startswith(("../", "/")) else name


def few_images(split: str, images: int) -> str:
    """Returns in words that a split is too small for its figures to tell much; "" if it is not."""
    if not images or images >= 100:
        return ""
    chance = min(100, 1000 / images)
    return f"{split} has {images} images only: by chance alone its recall at 10 is {chance:.0f} %"


def with_captions_per_image(dataset: PairDataset, count: int) -> PairDataset:
    """Returns a split with at most the first `count` captions of each image, or all for 0."""
    if not count:
        return dataset
    seen = np.zeros(len(dataset.image_id), int)
    kept = []
    for pair, image in enumerate(dataset.caption_image):
        if seen[image] < count:
            kept.append(pair)
        seen[image] += 1
    return dataclasses.replace(
        dataset,
        captions=[dataset.captions[pair] for pair in kept],
        caption_image=dataset.caption_image[kept],
        caption_id=dataset.caption_id[kept],
        truth=None if dataset.truth is None else dataset.truth.of_captions(kept),
    )

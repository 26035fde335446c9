"""Datasets as the training loop sees them: captions, the image of each, and access to images."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from fne_jax.data.sources import shapes_scenes
from fne_jax.data.sources.listing import SPLITS
from fne_jax.errors import UserError

IN_MEMORY_SOURCES = ("npz", "synthetic")
# Values of config.data.source.
SOURCES = (
    *("karpathy", "flickr8k", "flickr30k", "coco", "json_lists", "csv", "jsonl", "shapes"),
    *IN_MEMORY_SOURCES,
)


@dataclasses.dataclass(frozen=True)
class KnownTruth:
    """What `shapes` knows: which captions are true of which images, labelled or not.

    Attributes:
      scenes: [images, objects, fields] see `shapes_scenes`.
      facts: [pairs, fields] the same of the captions.
    """

    scenes: np.ndarray
    facts: np.ndarray

    def matrix(self) -> np.ndarray:
        """Returns [images, pairs] bool."""
        return shapes_scenes.truth_matrix(self.facts, self.scenes)

    def is_true(self, caption: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Returns [n] bool for [n] indices of captions and of images."""
        return shapes_scenes.is_true(self.facts[caption], self.scenes[image])


@dataclasses.dataclass(frozen=True)
class PairDataset:
    """One split. A pair is a caption and its image, and its id is the caption's index.

    Attributes:
      captions: [pairs] raw captions.
      caption_image: [pairs] int32 index of each caption's image.
      image_id: [images] int32 ids, unique over the whole dataset; COCO's own for COCO.
      images: [images, side, side, 3] uint8 pixels in memory, or a random-access source of
        records whose `image` is a JPEG.
      caption_id: [pairs] int64 ids of the captions; COCO's own (its annotations') for COCO.
      source_image_id: [images] what the source itself calls each image.
      truth: the matches beyond the labelled ones, where they are known.
    """

    captions: list[str]
    caption_image: np.ndarray
    image_id: np.ndarray
    images: np.ndarray | Sequence[dict[str, Any]]
    caption_id: np.ndarray
    source_image_id: list[str]
    truth: KnownTruth | None = None

    @property
    def in_memory(self) -> bool:
        """True where `images` are pixels."""
        return isinstance(self.images, np.ndarray)


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
    truth = dataset.truth
    if truth is not None:
        truth = dataclasses.replace(truth, facts=truth.facts[kept])
    return dataclasses.replace(
        dataset,
        captions=[dataset.captions[pair] for pair in kept],
        caption_image=dataset.caption_image[kept],
        caption_id=dataset.caption_id[kept],
        truth=truth,
    )


def check_source(data: ml_collections.ConfigDict) -> None:
    """Raises UserError, listing the choices, if there is no such `config.data.source`."""
    if data.source not in SOURCES:
        raise UserError(
            f"config.data.source is {data.source!r}; expected one of {', '.join(SOURCES)}"
        )


def load_split(data: ml_collections.ConfigDict, image_size: int, split: str) -> PairDataset:
    """Returns a split of the dataset that `config.data` describes, preparing it if need be.

    Args:
      data: `config.data`, see configs/base.py.
      image_size: pixels of a side that the encoder takes.
      split: train, val or test.

    Raises:
      UserError: naming what is wrong with the field or the source.
    """
    if split not in SPLITS:
        raise UserError(f"the split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
    check_source(data)
    if data.source == "synthetic":
        return synthetic_split(data.synthetic, image_size, split)
    if data.source == "npz":
        return npz_split(data.dir, image_size, split)
    # Kept out of the module's imports: training from arrays must work without TensorFlow.
    from fne_jax.data import loading

    return loading.prepared_split(loading.prepared_builder(data), split)


def synthetic_split(
    settings: ml_collections.ConfigDict, image_size: int, split: str
) -> PairDataset:
    """Returns made-up pairs to exercise a machine: each image a colour, each caption its name.

    Args:
      settings: `config.data.synthetic`.
      image_size: pixels of a side.
      split: train, val or test; each has its own ids.
    """
    rng = np.random.default_rng([settings.seed, SPLITS.index(split)])
    count = settings.images
    colours = rng.integers(0, 8, (count, 3))
    noise = rng.integers(0, 32, (count, image_size, image_size, 3))
    pixels = (colours[:, None, None, :] * 32 + noise).astype(np.uint8)
    words = ("red", "green", "blue")
    captions = [
        " ".join(
            f"{word} {['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven'][level]}"
            for word, level in zip(words, levels, strict=True)
        )
        for levels in np.repeat(colours, 2, axis=0)
    ]
    return PairDataset(
        captions=captions,
        caption_image=np.repeat(np.arange(count, dtype=np.int32), 2),
        image_id=np.arange(count, dtype=np.int32) + SPLITS.index(split) * count,
        images=pixels,
        caption_id=np.arange(2 * count) + SPLITS.index(split) * 2 * count,
        source_image_id=[f"{split} {index}" for index in range(count)],
    )


def npz_split(folder: str, image_size: int, split: str) -> PairDataset:
    """Returns the pairs of `<folder>/<split>.npz`.

    The file holds `images` [images, side, side, 3] uint8, `captions` [pairs] text,
    `caption_image` [pairs] integer indices, and optionally `image_id` [images] integers.

    Raises:
      UserError: if the file is not there or an array does not fit.
    """
    path = epath.Path(folder) / f"{split}.npz"
    try:
        arrays = dict(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} (config.data.dir): cannot be read as .npz: {error}") from error
    for name in ("images", "captions", "caption_image"):
        if name not in arrays:
            raise UserError(f"{path}: the array {name!r} is missing; it has {', '.join(arrays)}")
    images, owner = arrays["images"], arrays["caption_image"]
    if images.dtype != np.uint8 or images.shape[1:] != (image_size, image_size, 3):
        raise UserError(
            f"{path}: images: expected uint8 [images, {image_size}, {image_size}, 3] "
            f"(config.encoder.image.image_size), got {images.dtype} {list(images.shape)}"
        )
    if owner.shape != arrays["captions"].shape or owner.ndim != 1:
        raise UserError(f"{path}: caption_image: expected one index for each caption")
    if len(owner) == 0 or owner.min() < 0 or owner.max() >= len(images):
        raise UserError(f"{path}: caption_image: expected indices from 0 to {len(images) - 1}")
    image_id = arrays.get("image_id", np.arange(len(images))).astype(np.int32)
    return PairDataset(
        captions=[str(text) for text in arrays["captions"]],
        caption_image=owner.astype(np.int32),
        image_id=image_id,
        images=images,
        caption_id=np.arange(len(owner)),
        source_image_id=[str(number) for number in image_id],
    )

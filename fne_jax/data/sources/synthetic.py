"""`synthetic`: made-up pairs to exercise a machine, each image a colour that its captions name."""

from __future__ import annotations

import ml_collections
import numpy as np

from fne_jax.data.pairs import SPLITS, PairDataset

_CAPTIONS_PER_IMAGE = 2
_CHANNELS = ("red", "green", "blue")
_LEVELS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


def load_split(data: ml_collections.ConfigDict, image_size: int, split: str) -> PairDataset:
    """Returns the made-up pairs of a split; each split has ids of its own.

    Args:
      data: The group `config.data`.
      image_size: The pixels of a side.
      split: "train", "val" or "test".
    """
    number, count = SPLITS.index(split), data.synthetic.images
    rng = np.random.default_rng([data.synthetic.seed, number])
    colours = rng.integers(0, len(_LEVELS), (count, 3))
    noise = rng.integers(0, 32, (count, image_size, image_size, 3))
    pixels = (colours[:, None, None, :] * 32 + noise).astype(np.uint8)
    pairs = _CAPTIONS_PER_IMAGE * count
    return PairDataset(
        captions=[
            " ".join(f"{c} {_LEVELS[level]}" for c, level in zip(_CHANNELS, levels, strict=True))
            for levels in np.repeat(colours, _CAPTIONS_PER_IMAGE, axis=0)
        ],
        caption_image=np.repeat(np.arange(count, dtype=np.int32), _CAPTIONS_PER_IMAGE),
        image_id=np.arange(count, dtype=np.int32) + number * count,
        images=pixels,
        caption_id=np.arange(pairs) + number * pairs,
        source_image_id=[f"{split} {index}" for index in range(count)],
    )

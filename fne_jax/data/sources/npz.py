"""`npz`: arrays of one's own, a file for each split."""

from __future__ import annotations

import io
import zipfile

import ml_collections
import numpy as np
from etils import epath

from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError


def load_split(data: ml_collections.ConfigDict, image_size: int, split: str) -> PairDataset:
    """Returns the pairs of `<data.dir>/<split>.npz`.

    The file holds `images` [images, side, side, 3] uint8, `captions` [pairs] text,
    `caption_image` [pairs] integer indices, and optionally `image_id` [images] integers.

    Args:
      data: The group `config.data`.
      image_size: The pixels of a side that the images must have.
      split: "train", "val" or "test".

    Raises:
      UserError: If the file is not there or an array does not fit.
    """
    path = epath.Path(data.dir) / f"{split}.npz"
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

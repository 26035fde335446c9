"""`npz`: arrays of one's own, a file for each split."""

from __future__ import annotations

import io

import ml_collections
import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.data.sources.listing import caption_fault, existing_folder
from fne_jax.errors import UserError
from fne_jax.files import as_user_error


def load_split(data: ml_collections.ConfigDict, image_size: int, split: str) -> PairDataset:
    """Returns the pairs of `<data.dir>/<split>.npz`.

    The file holds `images` [images, image_size, image_size, 3] uint8, `captions` [pairs] text (or
    bytes in UTF-8), `caption_image` [pairs] integer indices, and optionally `image_id` [images]
    integers. Raises UserError if the file is missing or an array does not fit.
    """
    path = existing_folder(data.dir, f"{split}.npz") / f"{split}.npz"
    arrays = _read(path)
    for name in ("images", "captions", "caption_image"):
        if name not in arrays:
            raise UserError(f"{path}: the array {name!r} is missing; it has {', '.join(arrays)}")
    images = arrays["images"]
    if images.dtype != np.uint8 or images.shape[1:] != (image_size, image_size, 3):
        raise UserError(
            f"{path}: images: expected uint8 [images, {image_size}, {image_size}, 3] "
            f"(config.encoder.image.image_size), got {images.dtype} {list(images.shape)}"
        )
    captions = _captions(path, arrays["captions"])
    owner = _owner(path, arrays["caption_image"], len(captions), len(images))
    image_id = _image_ids(path, arrays.get("image_id"), len(images))
    return PairDataset(
        captions=captions,
        caption_image=owner,
        image_id=image_id,
        images=images,
        caption_id=np.arange(len(owner)),
        source_image_id=[str(number) for number in image_id],
    )


def _read(path):
    try:
        loaded = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            return dict(loaded)
        fault = "it is a single array, as np.save writes; expected several, as np.savez does"
    except Exception as error:  # NumPy and zipfile raise almost anything on damaged bytes
        fault = f"{error}"
        if "Object arrays" in fault:
            fault += "; store captions as text, np.array(captions, dtype=str)"
    raise UserError(f"{path} (config.data.dir): cannot be read as .npz: {fault}")


def _captions(path, captions):
    """Returns the captions as a list of text."""
    if captions.ndim != 1 or captions.dtype.kind not in "US" or not len(captions):
        raise UserError(
            f"{path}: captions: expected text [pairs], got {captions.dtype} {list(captions.shape)}"
        )
    texts = []
    for number, caption in enumerate(captions.tolist()):
        with as_user_error(
            f"{path}: captions[{number}]: not text in UTF-8", errors=UnicodeDecodeError
        ):
            text = caption.decode() if isinstance(caption, bytes) else caption
        fault = caption_fault(text)
        if fault:
            raise UserError(f"{path}: captions[{number}]: {fault}")
        texts.append(text)
    return texts


def _owner(path, owner, captions, images):
    """Returns the [captions] int32 indices of the captions' images."""
    owner = _integers(path, "caption_image", owner, "caption", captions, images - 1)
    without = np.setdiff1d(np.arange(images), owner)
    if len(without):
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        raise UserError(
            f"{path}: caption_image: images[{without[0]}]{more} has no caption; each needs one"
        )
    return owner


def _image_ids(path, image_id, images):
    """Returns the [images] int32 ids of the images, which are numbered where none are given."""
    if image_id is None:
        return np.arange(images, dtype=np.int32)
    image_id = _integers(path, "image_id", image_id, "image", images, np.iinfo(np.int32).max)
    numbers, counts = np.unique(image_id, return_counts=True)
    if counts.max() > 1:
        raise UserError(
            f"{path}: image_id: {numbers[counts.argmax()]} is there {counts.max()} times; ids must "
            "be unique"
        )
    return image_id


def _integers(path, name, values, each, count, most):
    """Returns [count] whole numbers from 0 to the largest allowed as int32."""
    if values.shape != (count,) or values.dtype.kind not in "iu":
        raise UserError(
            f"{path}: {name}: expected one number for each {each}, an integer [{count}], got "
            f"{values.dtype} {list(values.shape)}"
        )
    if values.min() < 0 or values.max() > most:
        raise UserError(f"{path}: {name}: expected numbers from 0 to {most}")
    return values.astype(np.int32)

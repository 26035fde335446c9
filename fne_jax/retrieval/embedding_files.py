"""Embeddings of a split as a folder of arrays, to give away and to take from other models.

`image_embeddings.npy` is [images, dim] floats, `text_embeddings.npy` [captions, dim] floats, and
`caption_image.npy` [captions] integers, the row of each caption's image. Further files are read if
they are there: `image_id.npy` [images] and `caption_id.npy` [captions] integers (else the rows),
and `matches.npy` [images, captions] bool, every true match.

Two more are written and never read: `top50.npz` with `i2t` [images, 50] rows of captions and `t2i`
[captions, 50] rows of images, the most similar first, and `i2t_similarity` and `t2i_similarity`;
and `names.json` with `images`, what the source calls them, and the raw `captions`.
"""

from __future__ import annotations

import io
import json
import pathlib

import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.files import write_atomically
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.retrieval.ranked_lists import top_lists

TOP = 50
# Rows whose norm is this near to 1 are taken as they are.
_UNIT = 1e-3


def write_embeddings(
    folder: pathlib.Path, split: EmbeddedSplit, dataset: PairDataset | None
) -> None:
    """Writes a split's files; those of an older dump in the same folder are replaced or go.

    Args:
      folder: The folder to write into; it is created if need be.
      split: What to write.
      dataset: The split's dataset, for the names of images and captions; None if there is none.

    Raises:
      UserError: if the folder cannot be written to.
    """
    i2t, i2t_similarity = top_lists(split.image_emb, split.text_emb, TOP)
    t2i, t2i_similarity = top_lists(split.text_emb, split.image_emb, TOP)
    lists = {"i2t": i2t, "t2i": t2i}
    lists |= {"i2t_similarity": i2t_similarity, "t2i_similarity": t2i_similarity}
    arrays = {
        "image_embeddings": split.image_emb,
        "text_embeddings": split.text_emb,
        "caption_image": split.caption_image,
        "image_id": split.image_id,
        "caption_id": split.caption_id,
        "matches": split.truth,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("matches.npy", "names.json"):
            # Not every split has them, and those of another would be taken for this one's.
            (folder / name).unlink(missing_ok=True)
        for name, array in arrays.items():
            if array is not None:
                write_atomically(folder / f"{name}.npy", _as_bytes(np.save, array))
        write_atomically(folder / f"top{TOP}.npz", _as_bytes(np.savez, **lists))
        if dataset is not None:
            names = {"images": dataset.source_image_id, "captions": dataset.captions}
            write_atomically(folder / "names.json", json.dumps(names) + "\n")
    except OSError as error:
        raise UserError(f"--dump={folder}: cannot be written: {error}") from error


def _as_bytes(save, *arrays, **named):
    """Returns what NumPy's `save` or `savez` writes."""
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


def read_embeddings(folder: pathlib.Path) -> EmbeddedSplit:
    """Returns the split that a folder holds; rows that are not of length 1 are normalised.

    Raises:
      UserError: naming the file, and what is wrong with it.
    """
    if not folder.is_dir():
        raise UserError(f"--embeddings={folder} is not a folder")
    image_emb, text_emb = (_read_rows(folder / f"{kind}_embeddings.npy") for kind in _KINDS)
    if image_emb.shape[1] != text_emb.shape[1]:
        raise UserError(
            f"{folder}: image_embeddings.npy has {image_emb.shape[1]} dimensions, "
            f"text_embeddings.npy {text_emb.shape[1]}; expected as many"
        )
    images, captions = len(image_emb), len(text_emb)
    owner = _read_integers(folder / "caption_image.npy", captions)
    if owner.min() < 0 or owner.max() >= images:
        raise UserError(
            f"{folder / 'caption_image.npy'}: expected rows 0 to {images - 1} of "
            f"image_embeddings.npy, got {owner.min()} to {owner.max()}"
        )
    lonely = np.setdiff1d(np.arange(images), owner)
    if len(lonely):
        raise UserError(
            f"{folder / 'caption_image.npy'}: {len(lonely)} images have no caption and cannot be "
            f"ranked: rows {lonely[:10].tolist()}"
        )
    ids = []
    for kind, count in (("image", images), ("caption", captions)):
        path = folder / f"{kind}_id.npy"
        ids.append(_read_integers(path, count) if path.exists() else np.arange(count))
    return EmbeddedSplit(image_emb, text_emb, owner, *ids, _read_matches(folder, images, captions))


_KINDS = ("image", "text")


def _read_array(path):
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as .npy: {error}") from error


def _read_rows(path):
    """Returns [rows, dim] float32 unit rows."""
    rows = _read_array(path)
    if rows.ndim != 2 or not rows.size or not np.issubdtype(rows.dtype, np.floating):
        raise UserError(f"{path}: expected floats [rows, dim], got {rows.dtype} {list(rows.shape)}")
    rows = rows.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise UserError(f"{path}: {len(bad)} rows are not finite, first {bad[:10].tolist()}")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if (length == 0).any():
        zero = np.flatnonzero(length[:, 0] == 0)
        raise UserError(f"{path}: {len(zero)} rows are all 0, first {zero[:10].tolist()}")
    # Rows of length 1 stay equal to the bit, so that a dump scores as its model did.
    return np.where(abs(length - 1) < _UNIT, rows, rows / length)


def _read_integers(path, count):
    array = _read_array(path)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{path}: expected {count} integers, got {array.dtype} {list(array.shape)}")
    return array


def _read_matches(folder, images, captions):
    path = folder / "matches.npy"
    if not path.exists():
        return None
    matches = _read_array(path)
    if matches.shape != (images, captions) or matches.dtype != bool:
        raise UserError(
            f"{path}: expected bool [{images}, {captions}], got {matches.dtype} "
            f"{list(matches.shape)}"
        )
    for axis, kind in ((1, "images"), (0, "captions")):
        lonely = np.flatnonzero(~matches.any(axis=axis))
        if len(lonely):
            raise UserError(f"{path}: {kind} without a match: rows {lonely[:10].tolist()}")
    return matches

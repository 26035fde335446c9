"""Embeddings of a split as a folder of arrays, to give away and to take from other models.

`image_embeddings.npy` is [images, dim] floats, `text_embeddings.npy` [captions, dim] floats, and
`caption_image.npy` [captions] integers, the row of each caption's image. Further files are read if
they are there: `image_id.npy` [images] and `caption_id.npy` [captions] integers (else the rows),
`matches.npy` [images, captions] bool, every true match, `names.json` with `images`, what the source
calls them, and the raw `captions`, and `parts.json`, by which parts of two dumps are told apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
import tokenize
import zipfile
from collections.abc import Mapping

import numpy as np

from fne_jax.data.pairs import PairDataset, portable_name
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, write_atomically
from fne_jax.model.embedded_split import EmbeddedSplit

# Rows whose norm is this near to 1 are taken as they are.
_UNIT = 1e-3
_KINDS = ("image", "text")
# What NumPy raises for files that are no arrays, or damaged.
_UNREADABLE = (
    *(OSError, ValueError, EOFError, MemoryError, SyntaxError),
    *(tokenize.TokenError, zipfile.BadZipFile),
)
_NAMES, _PARTS = "names.json", "parts.json"
# In the order in which they are written. An older dump's go first, so that a folder that a killed
# dump leaves behind has no embeddings, or none of one side, and is refused.
_ARRAYS = ("matches", "caption_id", "image_id", "caption_image", "text_embeddings")
_ARRAYS += ("image_embeddings",)


def write_embeddings(folder: pathlib.Path, split: EmbeddedSplit) -> None:
    """Writes a split's files; those of an older dump in the same folder go before.

    The folder is created if need be; names of images and captions are written if the split has its
    dataset. Raises UserError if the folder cannot be written to.
    """
    arrays = _order(split.caption_image, split.image_id, split.caption_id, split.truth)
    arrays |= {"image_embeddings": split.image_emb, "text_embeddings": split.text_emb}
    with as_user_error(f"--dump={folder}: cannot be written"):
        _write(folder, arrays, split.dataset)


def write_order(folder: pathlib.Path, dataset: PairDataset) -> None:
    """Writes all files of a split but its embeddings, which anyone's model may add.

    Rows of `image_embeddings.npy` and `text_embeddings.npy` are then those of `images` and
    `captions` in `names.json`.

    The folder is created if need be. Raises UserError if the folder holds embeddings, which may be
    in another order, or cannot be written to.
    """
    for kind in _KINDS:
        path = folder / f"{kind}_embeddings.npy"
        if path.exists():
            raise UserError(f"{path} already exists; give a folder without embeddings")
    truth = None if dataset.truth is None else dataset.truth.matrix()
    arrays = _order(dataset.caption_image, dataset.image_id, dataset.caption_id, truth)
    with as_user_error(f"--out={folder}: cannot be written"):
        _write(folder, arrays, dataset)


def _order(caption_image, image_id, caption_id, truth):
    arrays = {"caption_image": caption_image, "image_id": image_id, "caption_id": caption_id}
    return arrays if truth is None else arrays | {"matches": truth}


def _write(
    folder: pathlib.Path, arrays: Mapping[str, np.ndarray], dataset: PairDataset | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # What this dump does not have would be taken for its own.
    for name in (_PARTS, *(f"{name}.npy" for name in reversed(_ARRAYS)), _NAMES):
        (folder / name).unlink(missing_ok=True)
    digests = {}

    def write(name: str, content: bytes) -> None:
        write_atomically(folder / name, content)
        digests[name] = hashlib.sha256(content).hexdigest()

    if dataset is not None:
        names = {"images": list(dataset.source_image_id), "captions": list(dataset.captions)}
        write(_NAMES, (json.dumps(names) + "\n").encode())
    for name in _ARRAYS:
        if name in arrays:
            stream = io.BytesIO()
            np.save(stream, arrays[name])
            write(f"{name}.npy", stream.getvalue())
    write_atomically(folder / _PARTS, json.dumps({"sha256": digests}, indent=2) + "\n")


def read_embeddings(folder: pathlib.Path) -> EmbeddedSplit:
    """Returns the split that a folder holds; rows that are not of length 1 are normalised.

    Raises UserError, naming the file, and what is wrong with it.
    """
    if not folder.is_dir():
        raise UserError(f"--embeddings={folder} is not a folder")
    _check_parts(folder)
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
    image_id, caption_id = ids
    return EmbeddedSplit(
        image_emb, text_emb, owner, image_id, caption_id, _read_matches(folder, images, owner)
    )


def read_embeddings_of(folder: pathlib.Path, dataset: PairDataset) -> EmbeddedSplit:
    """Returns the embeddings of a dataset's split in the split's order, whatever the folder's is.

    Rows are found by `image_id.npy` and `caption_id.npy`. Where one of them is missing, the rows
    have to be in the split's order.

    Raises UserError, naming the file, if it cannot be read or is not of this split.
    """
    split = read_embeddings(folder)
    images = _rows_of(folder / "image_id.npy", split.image_id, dataset.image_id)
    captions = _rows_of(folder / "caption_id.npy", split.caption_id, dataset.caption_id)
    known = _read_names(folder / _NAMES, images=len(split.image_emb), captions=len(split.text_emb))
    split = split.part(images, captions)
    if not np.array_equal(split.caption_image, dataset.caption_image):
        raise UserError(
            f"--embeddings={folder} is of {len(split.image_emb)} images and "
            f"{len(split.text_emb)} captions, the split of {len(dataset.image_id)} and "
            f"{len(dataset.captions)}; expected the same, each caption with the same image. "
            "`convert order` writes the split's order, and ids by which any other is understood"
        )
    for kind, rows, ours in (
        ("images", images, dataset.image_names),
        ("captions", captions, dataset.captions),
    ):
        for row, own in zip(rows, ours, strict=True) if kind in known else ():
            if portable_name(known[kind][row]) != own and known[kind][row] != own:
                raise UserError(
                    f"{folder / _NAMES}: {kind[:-1]} {row} is {known[kind][row]!r}, that of the "
                    f"split is {own!r}; the embeddings are of another dataset or split"
                )
    return dataclasses.replace(split, dataset=dataset)


def read_caption_embeddings(path: pathlib.Path, captions: int) -> np.ndarray:
    """Returns embeddings of a split's captions by any sentence encoder, normalised.

    The file is an `.npy` of floats [captions, dim], in the split's order. Raises UserError if it
    cannot be read, has another number of rows, or has a row that is not finite or all 0.
    """
    rows = _read_rows(path)
    if len(rows) != captions:
        raise UserError(
            f"{path}: {len(rows)} rows; expected {captions}, one for each caption of the split, in "
            "its order, which `convert order` writes"
        )
    return rows


def _rows_of(path, ids, wanted):
    """Returns the row of each wanted id; all rows as they are where there is no file."""
    if not path.exists() or np.array_equal(ids, wanted):
        return np.arange(len(ids))
    for name, array in ((str(path), ids), (f"{path}: of the split", wanted)):
        unique, count = np.unique(array, return_counts=True)
        if len(unique) < len(array):
            raise UserError(
                f"{name}: some ids appear more than once, first "
                f"{unique[count > 1][:3].tolist()}, so rows cannot be matched by them"
            )
    missing, foreign = np.setdiff1d(wanted, ids), np.setdiff1d(ids, wanted)
    if len(missing) or len(foreign):
        raise UserError(
            f"{path}: {len(missing)} of the split's {len(wanted)} ids are missing, first "
            f"{missing[:3].tolist()}, and {len(foreign)} are not the split's, first "
            f"{foreign[:3].tolist()}; the embeddings are of another dataset or split"
        )
    order = np.argsort(ids)
    return order[np.searchsorted(ids, wanted, sorter=order)]


def _read_json(path):
    errors = (OSError, ValueError, RecursionError)
    with as_user_error(f"{path}: cannot be read as JSON", errors=errors):
        return json.loads(path.read_bytes())


def _read_names(path, **counts):
    """Returns the lists of texts that a file has, of so many images and captions."""
    names = _read_json(path) if path.exists() else {}
    for kind, count in counts.items():
        texts = names.get(kind, [""] * count) if isinstance(names, dict) else None
        if (
            not isinstance(texts, list)
            or len(texts) != count
            or not all(isinstance(text, str) for text in texts)
        ):
            raise UserError(f"{path}: expected an object with a list `{kind}` of {count} texts")
    return names


def _check_parts(folder):
    """Raises UserError if a part is not what was written together with the others."""
    path = folder / _PARTS
    if not path.exists():
        return
    parts = _read_json(path)
    digests = parts.get("sha256") if isinstance(parts, dict) else None
    if not isinstance(digests, dict):
        raise UserError(f"{path}: expected an object with the digests `sha256` of files")
    for name in [*(f"{name}.npy" for name in _ARRAYS), _NAMES]:
        if name not in digests:
            continue
        with (
            as_user_error(f"{folder / name}: cannot be read"),
            (folder / name).open("rb") as stream,
        ):
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != digests[name]:
            raise UserError(
                f"{folder / name} is not the file that was written with the others of this "
                f"folder; write them all again, or delete {_PARTS} if you replaced it on purpose "
                "and rows mean the same"
            )


def _read_array(path):
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except _UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as .npy: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f"{path}: is an .npz archive; expected one array, as np.save writes it")
    return array


def _read_rows(path):
    """Returns [rows, dim] float32 unit rows."""
    rows = _read_array(path)
    if rows.ndim != 2 or not rows.size or not np.issubdtype(rows.dtype, np.floating):
        raise UserError(f"{path}: expected floats [rows, dim], got {rows.dtype} {list(rows.shape)}")
    rows = rows.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise UserError(f"{path}: {len(bad)} rows are not finite, first {bad[:10].tolist()}")
    # In float64, where the squares of no float32 overflow or vanish.
    length = np.sqrt(np.einsum("rd,rd->r", rows, rows, dtype=np.float64))[:, None]
    if (length == 0).any():
        zero = np.flatnonzero(length[:, 0] == 0)
        raise UserError(f"{path}: {len(zero)} rows are all 0, first {zero[:10].tolist()}")
    # Rows of length 1 stay equal to the bit, so that a dump scores as its model did.
    return np.where(abs(length - 1) < _UNIT, rows, rows / length).astype(np.float32)


def _read_integers(path, count):
    array = _read_array(path)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{path}: expected {count} integers, got {array.dtype} {list(array.shape)}")
    return array


def _read_matches(folder, images, owner):
    path = folder / "matches.npy"
    if not path.exists():
        return None
    matches, captions = _read_array(path), len(owner)
    if matches.shape != (images, captions) or matches.dtype != bool:
        raise UserError(
            f"{path}: expected bool [{images}, {captions}], got {matches.dtype} "
            f"{list(matches.shape)}"
        )
    for axis, kind in ((1, "images"), (0, "captions")):
        lonely = np.flatnonzero(~matches.any(axis=axis))
        if len(lonely):
            raise UserError(f"{path}: {kind} without a match: rows {lonely[:10].tolist()}")
    foreign = np.flatnonzero(~matches[owner, np.arange(captions)])
    if len(foreign):
        raise UserError(
            f"{path}: captions that do not match their own image of caption_image.npy: rows "
            f"{foreign[:10].tolist()}"
        )
    return matches

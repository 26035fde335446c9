"""Files of pairs that match though nobody labelled them: `config.data.matches`.

A list that a detector made is an `.npz`; verdicts are a table, `.csv` or `.jsonl`. Either names
images and captions by their ids, so that it holds however the dataset is prepared.
"""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, write_atomically

SUFFIX = ".npz"
# The checksum of the captions and the images that the list is about.
_CHECKSUM = "split_checksum"
_ARRAYS = {"caption_id": np.int64, "image_id": np.int64, "probability": np.float16}


def write_match_list(
    path: pathlib.Path, dataset: PairDataset, pairs: Pairs, about: Mapping[str, Any]
) -> None:
    """Writes an `.npz` of pairs that a detector takes for matches, with their probability.

    `about` tells people what made the list: detector, run and the like. Raises UserError if the
    file cannot be written.
    """
    content = io.BytesIO()
    np.savez(
        content,
        caption_id=dataset.caption_id[pairs.caption].astype(np.int64),
        image_id=dataset.image_id[pairs.image].astype(np.int64),
        probability=np.asarray(pairs.probability, np.float16),
        split_checksum=_split_checksum(dataset),
        about=json.dumps(dict(about)),
    )
    with as_user_error(f"{path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())


def read_match_list(path: pathlib.Path, dataset: PairDataset) -> Pairs:
    """Returns the pairs of a list that `write_match_list` wrote, with their probability as float16.

    Raises UserError if the file is not such a list, or is about other captions or images than the
    split's.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file; `audit --matches` writes lists of matches")
    where = f"{path}: expected a list of matches, as `audit --matches` writes it"
    errors = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    with (
        as_user_error(where, errors=errors),
        # np.load would leave a damaged file open.
        np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored,
    ):
        arrays = {name: stored[name] for name in (*_ARRAYS, _CHECKSUM)}
    length = len(arrays["caption_id"]) if arrays["caption_id"].ndim else -1
    for name, dtype in _ARRAYS.items():
        if arrays[name].dtype != dtype or arrays[name].shape != (length,):
            raise UserError(
                f"{path}: expected {name} as {np.dtype(dtype)} of shape [{max(length, 0)}], got "
                f"{arrays[name].dtype} of shape {list(arrays[name].shape)}; write the list again"
            )
    if str(arrays[_CHECKSUM]) != _split_checksum(dataset):
        raise UserError(
            f"{path} is about other captions or images than those of the split, or about images of "
            "other names; make it from a run on the same data"
        )
    probability = arrays["probability"]
    bad = np.flatnonzero(~((probability >= 0) & (probability <= 1)))
    if len(bad):
        raise UserError(
            f"{path}: expected probabilities from 0 to 1, got {probability[bad[0]]} in row "
            f"{bad[0]}; write the list again"
        )
    return Pairs(
        _rows(arrays["caption_id"], dataset.caption_id),
        _rows(arrays["image_id"], dataset.image_id),
        probability=probability,
    )


def _split_checksum(dataset):
    """Returns what tells the captions and the images, by ids and names, in whatever order."""
    captions = zip(dataset.caption_id.tolist(), dataset.captions, strict=True)
    images = zip(dataset.image_id.tolist(), dataset.image_names, strict=True)
    return hashlib.sha256(json.dumps([sorted(captions), sorted(images)]).encode()).hexdigest()[:16]


def _rows(ids, known):
    """Returns the rows of ids that the split has."""
    order = np.argsort(known, kind="stable")
    return order[np.searchsorted(known, ids, sorter=order)]

"""A split's embeddings by a run, kept beside it so that a second look at them need not wait."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import pathlib
import zipfile

import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.files import write_atomically
from fne_jax.model import checkpoints
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import Model

_KINDS = ("image_emb", "text_emb", "caption_bank")
# What NumPy raises for files that are no archives of arrays, or damaged.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

_log = logging.getLogger(__name__)


def embed(
    model: Model, dataset: PairDataset, path: pathlib.Path | None
) -> tuple[EmbeddedSplit, np.ndarray]:
    """Returns a split's embeddings, and those of its captions by the momentum encoder.

    Args:
      model: A run's, with its momentum encoders.
      dataset: The split.
      path: The `.npz` to take them from where it holds just these, and to write them to where it
        does not; None for neither. That it cannot be written is a warning.

    Raises:
      UserError: if embeddings are not finite.
    """
    about = ""
    if path is not None:
        about = _about(model, dataset)
        arrays = _read(path, about)
        if arrays is not None:
            image_emb, text_emb, bank = arrays
            ids = dataset.caption_image, dataset.image_id, dataset.caption_id
            return EmbeddedSplit(image_emb, text_emb, *ids), bank
    # The matrix of all true matches, large for a training split, is not needed.
    embedded = model.embed_split(dataclasses.replace(dataset, truth=None))
    tokens = model.tokenize(dataset.captions, model.config.evaluation.text_length)
    bank = model.embedder.captions(model.momentum_params, tokens)
    if path is not None:
        _write(path, about, (embedded.image_emb, embedded.text_emb, bank))
    return embedded, bank


def _about(model, dataset):
    """Returns what tells these embeddings from all others, as JSON."""
    momentum = checkpoints.fingerprints({"params": model.momentum_params})["params"]
    data = dataclasses.asdict(dataset.identity)
    about = {"model": model.identity(), "momentum": momentum, "data": data}
    return json.dumps(about, sort_keys=True)


def _read(path, about):
    try:
        # Opened here: NumPy leaves a damaged file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            if str(kept["about"]) != about:
                return None
            return [kept[kind] for kind in _KINDS]
    except FileNotFoundError:
        return None
    except _UNREADABLE as error:
        _log.warning("%s cannot be read, so all is embedded anew: %s", path, error)
        return None


def _write(path, about, arrays):
    stream = io.BytesIO()
    np.savez(stream, about=np.array(about), **dict(zip(_KINDS, arrays, strict=True)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, stream.getvalue())
    except OSError as error:
        _log.warning("%s cannot be written, so all will be embedded again: %s", path, error)

"""A split with a model's embeddings of it and all else that detectors of false negatives take."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.evaluation.embedding_files import read_caption_embeddings, read_embeddings_of
from fne_jax.false_negatives.fitted_detector import FittedDetector
from fne_jax.false_negatives.own_captions import CaptionTerms, OwnCaptions
from fne_jax.false_negatives.unlabelled import unlabelled_pairs
from fne_jax.files import refuse_snapshot, write_atomically
from fne_jax.logs import warn_once
from fne_jax.model import checkpoints
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import Model, load_evaluation_split
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    update_similarity_statistics,
)

# How many of each caption and of each image are its hardest.
HARDEST = 20
# Random images, and captions, that ranks are told by.
_OTHERS = 1000
_SEED = 0
# Rows of similarities to the random others that are held at once.
_BLOCK_ROWS = 1024
# What is kept of a split, and what NumPy raises for files that are no archives, or damaged.
_KEPT = ("image_emb", "text_emb", "caption_bank")
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedSplit(EmbeddedSplit):
    """A split of which detectors judge pairs; its dataset, config and statistics are known.

    Attributes:
      caption_bank: [captions, width] float32, L2-normalised, the embeddings by which captions are
        compared: by the momentum text encoder, or the model's own where there is none.
      external: [captions, width] float32, L2-normalised, by another sentence encoder, or None.
      fitted: The detector that was fitted to verdicts, or None.
    """

    caption_bank: np.ndarray
    external: np.ndarray | None = None
    fitted: FittedDetector | None = None

    @property
    def unlabelled(self) -> int:
        """The number of pairs of a caption and an image that is not its own."""
        return len(self.text_emb) * (len(self.image_emb) - 1)

    @property
    def model_name(self) -> str:
        """How verdicts name the model."""
        return self.name if self.step is None else f"{self.name} step {self.step}"

    @functools.cached_property
    def own(self) -> OwnCaptions:
        """The captions of each image."""
        return OwnCaptions.of(self.caption_image, len(self.image_emb))

    @functools.cached_property
    def terms(self) -> CaptionTerms:
        """The terms of the captions."""
        return CaptionTerms.of(self.dataset.captions, self.own)

    @functools.cached_property
    def best_own_similarity(self) -> np.ndarray:
        """[images] float32, the highest of each image to an own caption; -1 where it has none."""
        best = np.full(len(self.image_emb), -1, np.float32)
        np.maximum.at(best, self.caption_image, self.own_similarity)
        return best

    @functools.cached_property
    def to_random_images(self) -> tuple[np.ndarray, np.ndarray]:
        """[captions] mean and standard deviation of each one's similarity to random images."""
        return _mean_and_deviation(self.text_emb, self.image_emb)

    @functools.cached_property
    def to_random_captions(self) -> tuple[np.ndarray, np.ndarray]:
        """[images] mean and standard deviation of each one's similarity to random captions."""
        return _mean_and_deviation(self.image_emb, self.text_emb)

    @functools.cached_property
    def hardest(self) -> np.ndarray:
        """[n] int64, rising, `caption * images + image` of the `HARDEST` of each of either."""
        pairs = unlabelled_pairs(self, HARDEST)
        return np.sort(pairs.caption * len(self.image_emb) + pairs.image)


def embed(
    model: Model, dataset: PairDataset, kept: pathlib.Path | None = None, **more
) -> JudgedSplit:
    """Returns a split as a run's model sees it, with the statistics of the run's last epoch.

    The model is the run's, with its momentum encoders and statistics. Embeddings are taken from the
    `.npz` `kept`, if it holds just these, and else written to it; that it cannot be written is a
    warning. Raises UserError if embeddings are not finite.
    """
    about = "" if kept is None else _about(model, dataset)
    arrays = None if kept is None else _read(kept, about)
    if arrays is None:
        # The matrix of all true matches, large for a training split, is not needed.
        split = model.embed_split(dataclasses.replace(dataset, truth=None))
        arrays = {"image_emb": split.image_emb, "text_emb": split.text_emb}
        arrays["caption_bank"] = caption_bank(model, split.dataset)
        if kept is not None:
            _write(kept, about, arrays)
    known = {name: getattr(dataset, name) for name in ("caption_image", "image_id", "caption_id")}
    known |= {"step": model.step, "config": model.config, "stats": jax.device_get(model.stats)}
    return JudgedSplit(**arrays, **known, dataset=dataset, **more)


def caption_bank(model: Model, dataset: PairDataset) -> np.ndarray:
    """Returns the [captions, width] embeddings of captions by a run's momentum encoder."""
    tokens = model.tokenize_split(dataset, model.config.evaluation.text_length)
    # Frozen parts have no momentum copy, so what is kept of them serves here too.
    kept = model.with_kept(dataset, tokens).kept.get("text")
    return model.embedder.captions(model.momentum_params, tokens, kept)


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
            return {kind: kept[kind] for kind in _KEPT}
    except FileNotFoundError:
        return None
    except _UNREADABLE as error:
        _log.warning("%s cannot be read, so everything is embedded again: %s", path, error)
        return None


def _write(path, about, arrays):
    stream = io.BytesIO()
    np.savez(stream, about=np.array(about), **arrays)
    try:
        refuse_snapshot(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, stream.getvalue())
    except OSError as error:
        _log.warning("%s cannot be written, so all will be embedded again: %s", path, error)


def judged_by_model(
    model: Model,
    name: str,
    split_name: str,
    caption_embeddings: str | None = None,
    kept: pathlib.Path | None = None,
) -> JudgedSplit:
    """Returns a split as a run's model sees it, with the statistics of the run's last epoch.

    The model is the run's, with its momentum encoders and statistics; `caption_embeddings` the
    `.npy` of the captions' embeddings by another encoder; `kept` an `.npz` to keep the embeddings
    in for the next time. Raises UserError if the split or the captions' embeddings cannot be read.
    """
    dataset = model.load_split(split_name)
    warn_once(_log, model.unread(dataset.captions))
    external = _external(caption_embeddings, dataset)
    return embed(model, dataset, kept, name=name, split_name=split_name, external=external)


def judged_by_embeddings(
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
    split_name: str,
    caption_embeddings: str | None = None,
) -> JudgedSplit:
    """Returns a split with anyone's embeddings of it, and the statistics that these give.

    `caption_embeddings` is the `.npy` of the captions' embeddings by another encoder. Raises
    UserError if the embeddings or the split cannot be read, or do not belong together.
    """
    dataset = load_evaluation_split(config, split_name)
    embedded = read_embeddings_of(folder, dataset)
    batch = min(config.global_batch_size, len(dataset.captions))
    known = {
        "name": folder.resolve().name,
        "split_name": split_name,
        "config": config,
        "stats": split_statistics(embedded, batch=batch, seed=config.seed),
        "caption_bank": embedded.text_emb,
        "external": _external(caption_embeddings, dataset),
    }
    return JudgedSplit(**vars(embedded) | known)


def _external(path, dataset):
    if path is None:
        return None
    return read_caption_embeddings(pathlib.Path(path), len(dataset.captions))


def split_statistics(embedded: EmbeddedSplit, *, batch: int, seed: int) -> SimilarityStatistics:
    """Returns what an epoch of batches adds up to, as in training but for the model's learning.

    Of `batch` pairs each competes with the others; a last batch of fewer is left out.
    """
    update = jax.jit(update_similarity_statistics)
    stats = SimilarityStatistics.create()
    order = np.random.default_rng(seed).permutation(len(embedded.text_emb))
    for start in range(0, len(order) - batch + 1, batch):
        rows = order[start : start + batch]
        images = embedded.caption_image[rows]
        stats = update(
            stats,
            jnp.asarray(embedded.image_emb[images]),
            jnp.asarray(embedded.text_emb[rows]),
            jnp.asarray(images[:, None] == images[None, :]),
        )
    return jax.device_get(stats)


def _mean_and_deviation(query_emb, item_emb):
    """Returns two [queries] float32 over the similarities to the same random items."""
    rows = np.random.default_rng(_SEED).permutation(len(item_emb))[:_OTHERS]
    items = item_emb[rows]
    mean, deviation = np.empty((2, len(query_emb)), np.float32)
    for start in range(0, len(query_emb), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        similarity = query_emb[part] @ items.T
        mean[part], deviation[part] = similarity.mean(axis=1), similarity.std(axis=1)
    return mean, np.maximum(deviation, 1e-6)

"""How well detectors tell a run's false negatives, where the truth is known."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.data.pairs import PairDataset
from fne_jax.evaluation.top_k import top_k
from fne_jax.false_negatives.detection_quality import (
    HARDEST,
    detection_scores,
    hardest_pairs,
    quality,
)
from fne_jax.false_negatives.detectors import available, judge_by
from fne_jax.false_negatives.judged_split import JudgedSplit, caption_bank
from fne_jax.model.model import Model
from fne_jax.objectives.similarity_statistics import cosine, false_negative_posterior

_DETECTORS = ("gaussians", "captions", "words", "identical")
# Training images, with a caption of each, whose candidates are judged.
ANCHORS = 256


class _Anchors(NamedTuple):
    """The first training images, the first caption of each, and the queue's filled slots.

    Attributes:
      image: [anchors] rows of the images.
      caption: [anchors] rows of the captions.
      embeddings: [anchors, dim] online embeddings of the images, and of the captions.
      pair: [slots] the pair in each slot.
      slot_image: [slots] the row of its image.
      queue: [slots, dim] its momentum embeddings of the image, and of the caption.
    """

    image: np.ndarray
    caption: np.ndarray
    embeddings: tuple[np.ndarray, np.ndarray]
    pair: np.ndarray
    slot_image: np.ndarray
    queue: tuple[np.ndarray, np.ndarray]


def measure(model: Model, train: PairDataset) -> dict[str, Any]:
    """Returns how good the detectors are on the pairs that a run's loss weighs.

    These are of the first training images, and the first caption of each, with the other images'
    pairs in the queue.

    Args:
      model: The model of the run, with its queue and statistics.
      train: Its training split, whose true matches are all known.

    Returns:
      `roc_auc`, `average_precision`, `density`, `mean_posterior` and `calibration` of the loss's
      posterior over all pairs; and as `detectors` the `quality` of each detector on the hardest.
      Nothing for an empty queue, which a run of an in-batch objective may leave.
    """
    anchors = _anchors(model, train)
    if not len(anchors.pair):
        return {}
    posterior, truth = judged_candidates(model, train, anchors)
    scores = detection_scores(posterior, truth)
    # The precision at a recall is of use among the hardest alone.
    names = ("roc_auc", "average_precision", "density", "calibration")
    return {name: scores[name] for name in names} | {
        "mean_posterior": scores["mean_probability"],
        "detectors": _quality(model, train, anchors),
    }


def _anchors(model, train):
    queue = jax.device_get(model.queue)
    count = min(ANCHORS, len(train.image_id))
    image = np.arange(count)
    _, first_caption = np.unique(train.caption_image, return_index=True)
    caption = first_caption[:count]
    # Only the images that the ids name are read.
    split = model.embed_split(
        PairDataset(
            captions=[train.captions[row] for row in caption],
            caption_image=image.astype(np.int32),
            image_id=train.image_id[:count],
            images=train.images,
            caption_id=train.caption_id[caption],
            source_image_id=train.source_image_id[:count],
        )
    )
    filled = queue.image_id >= 0
    pair = queue.pair_id[filled]
    embeddings, slots = (split.image_emb, split.text_emb), (queue.image[filled], queue.text[filled])
    return _Anchors(image, caption, embeddings, pair, train.caption_image[pair], slots)


def judged_candidates(
    model: Model, train: PairDataset, anchors: _Anchors | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss's posterior [n] float32 and the truth [n] bool of what `measure` judges."""
    anchors = _anchors(model, train) if anchors is None else anchors
    fne, stats, pair = model.config.fne, jax.device_get(model.stats), anchors.pair
    other = anchors.image[:, None] != anchors.slot_image[None, :]
    is_true, slot_image = train.truth.is_true, anchors.slot_image
    truth = (
        [is_true(pair, np.full_like(pair, row)) for row in anchors.image],
        [is_true(np.full_like(pair, row), slot_image) for row in anchors.caption],
    )
    posterior = [
        false_negative_posterior(cosine(ours, keys), stats, fne.prior, monotone=fne.monotone)
        for ours, keys in zip(anchors.embeddings, reversed(anchors.queue), strict=True)
    ]
    return (
        np.concatenate([np.asarray(p)[other] for p in posterior]),
        np.concatenate([np.stack(t)[other] for t in truth]),
    )


def _quality(model, train, anchors):
    """Returns the quality of each detector that is there among the hardest of the queue."""
    groups = anchors.image, anchors.slot_image
    (image_emb, text_emb), (queue_image, queue_text) = anchors.embeddings, anchors.queue
    slot, similarity = top_k(image_emb, queue_text, max(HARDEST), groups)
    own = np.broadcast_to(anchors.image[:, None], slot.shape)
    candidates = hardest_pairs("i2t", Pairs(anchors.pair[slot], own, similarity))
    slot, similarity = top_k(text_emb, queue_image, max(HARDEST), groups)
    own = np.broadcast_to(anchors.caption[:, None], slot.shape)
    candidates |= hardest_pairs("t2i", Pairs(own, anchors.slot_image[slot], similarity))
    # Detectors that take no embeddings of the whole split: there are none, of width 0.
    split = JudgedSplit(
        image_emb=np.zeros((len(train.image_id), 0), np.float32),
        text_emb=np.zeros((len(train.captions), 0), np.float32),
        caption_image=train.caption_image,
        image_id=train.image_id,
        caption_id=train.caption_id,
        dataset=train,
        config=model.config,
        stats=jax.device_get(model.stats),
        caption_bank=caption_bank(model, train),
    )
    there = available(split)
    judges = {name: judge_by(name, split) for name in _DETECTORS if name in there}
    return quality(judges, candidates, train.truth.is_true)

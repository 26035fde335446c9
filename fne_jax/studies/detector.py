"""How well detectors tell a run's false negatives, where the truth is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.false_negatives import detection_quality, detectors
from fne_jax.false_negatives.detection_quality import HARDEST, Candidates, detection_scores
from fne_jax.false_negatives.pair_features import SplitInputs
from fne_jax.false_negatives.unlabelled import hardest_candidates
from fne_jax.model.model import Model
from fne_jax.objectives.similarity_statistics import cosine, false_negative_posterior

# Training images, with a caption of each, whose candidates are judged.
ANCHORS = 256


@dataclasses.dataclass(frozen=True)
class _Anchors:
    """The first training images and the first caption of each, and the queue's slots.

    Attributes:
      image: [anchors] rows of the images.
      caption: [anchors] rows of the captions.
      image_emb: [anchors, dim] online embeddings.
      text_emb: [anchors, dim] online embeddings.
      pair: [slots] the pair in each filled slot.
      slot_image: [slots] the row of its image.
      queue_image: [slots, dim] its momentum embeddings of the image.
      queue_text: [slots, dim] those of the caption.
    """

    image: np.ndarray
    caption: np.ndarray
    image_emb: np.ndarray
    text_emb: np.ndarray
    pair: np.ndarray
    slot_image: np.ndarray
    queue_image: np.ndarray
    queue_text: np.ndarray


def measure(model: Model, train: PairDataset) -> dict[str, Any]:
    """Returns how good the detectors are on the candidates in a run's queue.

    The anchors are the first training images, and the first caption of each; their candidates are
    what the queue holds of other images: the very pairs that the loss weighs.

    Args:
      model: The model of the run, with its queue and statistics.
      train: Its training split, whose true matches are all known.

    Returns:
      Of the loss's posterior over all candidates `roc_auc`, `average_precision`, `density`,
      `mean_posterior` and `calibration`; and as `detectors` what `detection_quality.quality`
      returns of each detector among the hardest.
    """
    anchors = _anchors(model, train)
    posterior, truth = judged_candidates(model, train, anchors)
    scores = detection_scores(posterior, truth)
    # The precision at a recall is of use among the hardest alone.
    of_loss = {
        name: scores[name] for name in ("roc_auc", "average_precision", "density", "calibration")
    }
    of_loss["mean_posterior"] = scores["mean_probability"]
    return of_loss | {"detectors": _quality(model, train, anchors)}


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
    return _Anchors(
        image,
        caption,
        split.image_emb,
        split.text_emb,
        pair,
        train.caption_image[pair],
        queue.image[filled],
        queue.text[filled],
    )


def judged_candidates(
    model: Model, train: PairDataset, anchors: _Anchors | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss's posterior [n] float32 and the truth [n] bool of the queue's candidates.

    Args:
      model: The model of the run, with its queue and statistics.
      train: Its training split, whose true matches are all known.
      anchors: The anchors and the queue; None to embed them here.
    """
    anchors = _anchors(model, train) if anchors is None else anchors
    fne, stats, pair = model.config.fne, jax.device_get(model.stats), anchors.pair
    other = anchors.image[:, None] != anchors.slot_image[None, :]
    similarity = [
        cosine(anchors.image_emb, anchors.queue_text),
        cosine(anchors.text_emb, anchors.queue_image),
    ]
    truth = [
        np.stack([train.truth.is_true(pair, np.full_like(pair, row)) for row in anchors.image]),
        np.stack(
            [
                train.truth.is_true(np.full_like(pair, row), anchors.slot_image)
                for row in anchors.caption
            ]
        ),
    ]
    posterior = [
        false_negative_posterior(s, stats, fne.prior, monotone=fne.monotone) for s in similarity
    ]
    return (
        np.concatenate([np.asarray(p)[other] for p in posterior]),
        np.concatenate([t[other] for t in truth]),
    )


def evidence_of(model: Model, train: PairDataset) -> detectors.Evidence:
    """Returns what a run's model knows of its training split, but for the embeddings of images.

    Args:
      model: The model of the run, with its statistics and its momentum encoders.
      train: Its training split.
    """
    tokens = model.tokenize(train.captions, model.config.evaluation.text_length)
    return detectors.Evidence(
        captions=train.captions,
        caption_image=train.caption_image,
        images=len(train.image_id),
        prior=model.config.fne.prior,
        stats=jax.device_get(model.stats),
        min_count=model.config.fne.min_count,
        caption_bank=model.embedder.captions(model.momentum_params, tokens),
    )


def embedded_evidence(model: Model, train: PairDataset) -> detectors.Evidence:
    """Returns what a run's model knows of its training split, with all of its embeddings.

    Args:
      model: The model of the run, with its statistics and its momentum encoders.
      train: Its training split.
    """
    # The matrix of all true matches, large for a training split, is not needed.
    embedded = model.embed_split(dataclasses.replace(train, truth=None))
    return dataclasses.replace(
        evidence_of(model, train), image_emb=embedded.image_emb, text_emb=embedded.text_emb
    )


def split_inputs(evidence: detectors.Evidence) -> SplitInputs:
    """Returns what a detector is fitted to, of evidence with embeddings."""
    return SplitInputs(
        evidence.image_emb,
        evidence.text_emb,
        evidence.caption_bank,
        evidence.captions,
        evidence.caption_image,
    )


def _quality(model, train, anchors):
    """Returns the quality of each detector that is there among the hardest of the queue."""
    most = max(HARDEST)
    images = anchors.image, anchors.slot_image
    slot, similarity = hardest_candidates(anchors.image_emb, anchors.queue_text, *images, most)
    own = np.broadcast_to(anchors.image[:, None], slot.shape)
    found = {"i2t": Candidates(anchors.pair[slot], own, similarity)}
    slot, similarity = hardest_candidates(anchors.text_emb, anchors.queue_image, *images, most)
    own = np.broadcast_to(anchors.caption[:, None], slot.shape)
    found["t2i"] = Candidates(own, anchors.slot_image[slot], similarity)
    evidence = evidence_of(model, train)
    judges = {name: detectors.fitted(name, evidence) for name in detectors.available(evidence)}
    return detection_quality.quality(judges, found, train.truth.is_true)

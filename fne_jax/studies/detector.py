"""How well a run's posterior tells its false negatives, where the truth is known."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.false_negatives.detection_quality import detection_scores
from fne_jax.model.model import Model
from fne_jax.objectives.similarity_statistics import cosine, false_negative_posterior

# Training images, with a caption of each, whose candidates are judged.
ANCHORS = 256


def measure(model: Model, train: PairDataset) -> dict[str, Any]:
    """Returns how good the loss's posterior is on the pairs that a run's loss weighs.

    These are of the first training images, and the first caption of each, with the other images'
    pairs in the queue.

    Returns:
      `roc_auc`, `average_precision`, `density`, `mean_posterior` and `calibration`, over all pairs.
      Nothing for an empty queue, which a run of an in-batch objective may leave.
    """
    posterior, truth = judged_candidates(model, train)
    if not len(truth):
        return {}
    scores = detection_scores(posterior, truth)
    # The precision at a recall is of use among the hardest alone.
    names = ("roc_auc", "average_precision", "density", "calibration")
    return {name: scores[name] for name in names} | {"mean_posterior": scores["mean_probability"]}


def judged_candidates(model: Model, train: PairDataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss's posterior [n] float32 and the truth [n] bool of what `measure` judges."""
    queue, stats, fne = *jax.device_get((model.queue, model.stats)), model.config.fne
    anchor = np.arange(min(ANCHORS, len(train.image_id)))
    _, first_caption = np.unique(train.caption_image, return_index=True)
    caption = first_caption[: len(anchor)]
    # Only the images that the ids name are read.
    split = model.embed_split(
        PairDataset(
            captions=[train.captions[row] for row in caption],
            caption_image=anchor.astype(np.int32),
            image_id=train.image_id[: len(anchor)],
            images=train.images,
            caption_id=train.caption_id[caption],
            source_image_id=train.source_image_id[: len(anchor)],
        )
    )
    filled = queue.image_id >= 0
    pair = queue.pair_id[filled]
    slot_image = train.caption_image[pair]
    other = anchor[:, None] != slot_image[None, :]
    is_true = train.truth.is_true
    truth = (
        [is_true(pair, np.full_like(pair, row)) for row in anchor],
        [is_true(np.full_like(pair, row), slot_image) for row in caption],
    )
    keys = (split.image_emb, queue.text[filled]), (split.text_emb, queue.image[filled])
    posterior = [
        false_negative_posterior(cosine(*pairs), stats, fne.prior, monotone=fne.monotone)
        for pairs in keys
    ]
    return (
        np.concatenate([np.asarray(p)[other] for p in posterior]),
        np.concatenate([np.stack(t)[other] for t in truth]),
    )

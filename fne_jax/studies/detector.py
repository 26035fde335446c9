"""How well the posterior tells a run's false negatives, where the truth is known."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from sklearn import metrics

from fne_jax.data.pairs import PairDataset
from fne_jax.model.model import Model
from fne_jax.objectives.similarity_statistics import cosine, false_negative_posterior

# Training images, with a caption of each, whose candidates are judged.
ANCHORS = 256
_BINS = 10


def judged_candidates(model: Model, train: PairDataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the posterior [n] float32 and the truth [n] bool of the candidates in a run's queue.

    The anchors are the first training images, and the first caption of each; their candidates are
    what the queue holds of other images: the very pairs that the loss weighs.

    Args:
      model: The model of the run, with its queue and statistics.
      train: Its training split, whose true matches are all known.
    """
    fne = model.config.fne
    queue, stats = jax.device_get((model.queue, model.stats))
    count = min(ANCHORS, len(train.image_id))
    images = np.arange(count)
    _, first_caption = np.unique(train.caption_image, return_index=True)
    captions = first_caption[:count]
    # Only the images that the ids name are read.
    anchors = PairDataset(
        captions=[train.captions[caption] for caption in captions],
        caption_image=images.astype(np.int32),
        image_id=train.image_id[:count],
        images=train.images,
        caption_id=train.caption_id[captions],
        source_image_id=train.source_image_id[:count],
    )
    split = model.embed_split(anchors)
    filled = queue.image_id >= 0
    pair = queue.pair_id[filled]
    other = train.image_id[:count, None] != queue.image_id[filled][None, :]
    similarity = [
        cosine(split.image_emb, queue.text[filled]),
        cosine(split.text_emb, queue.image[filled]),
    ]
    truth = [
        np.stack([train.truth.is_true(pair, np.full_like(pair, image)) for image in images]),
        np.stack(
            [
                train.truth.is_true(np.full_like(pair, caption), train.caption_image[pair])
                for caption in captions
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


def detection_scores(posterior: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Returns how good a probability is at telling what is true.

    Args:
      posterior: [n] probabilities, in [0, 1].
      truth: [n] bool, what is true.

    Returns:
      `roc_auc`, `average_precision` (None where all or nothing is true), `density` (the share that
      is true), `mean_posterior`, and `calibration`: for tenths of the probability, as far as they
      occur, a list of mean probability, share that is true, and number.
    """
    scores = {"density": float(truth.mean()), "mean_posterior": float(posterior.mean())}
    mixed = 0 < truth.mean() < 1
    scores["roc_auc"] = float(metrics.roc_auc_score(truth, posterior)) if mixed else None
    scores["average_precision"] = (
        float(metrics.average_precision_score(truth, posterior)) if mixed else None
    )
    tenth = np.minimum((posterior * _BINS).astype(int), _BINS - 1)
    scores["calibration"] = [
        [float(posterior[tenth == b].mean()), float(truth[tenth == b].mean()), int(n)]
        for b, n in enumerate(np.bincount(tenth, minlength=_BINS))
        if n
    ]
    return scores

"""How well a detector tells matches where it counts: among the hardest candidates of each query."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.evaluation.top_k import top_k
from fne_jax.false_negatives.detectors import Judge
from fne_jax.model.embedded_split import EmbeddedSplit

# How many of each query's hardest candidates are judged.
HARDEST = (1, 20)
# Queries of either direction whose candidates are judged, of a split that has more.
QUERIES = 1000
# At which share of the matches found the precision is told: a detector of recall 0.3 and precision
# 0.8 whose finds were further positives raised true text-to-image recall in trials.
RECALL = 0.3
_BINS = 10


def split_candidates(split: EmbeddedSplit, *, seed: int) -> dict[str, Pairs]:
    """Returns the hardest candidates of random images, `i2t`, and of random captions, `t2i`.

    They are of `QUERIES` random queries of either kind at most.

    Returns:
      By `<direction>_hardest_<count>`, the pairs.
    """
    rng, images = np.random.default_rng(seed), np.arange(len(split.image_emb))
    query = rng.permutation(len(images))[:QUERIES]
    groups = images[query], split.caption_image
    caption, similarity = top_k(split.image_emb[query], split.text_emb, max(HARDEST), groups)
    candidates = {"i2t": Pairs(caption, np.broadcast_to(query[:, None], caption.shape), similarity)}
    query = rng.permutation(len(split.text_emb))[:QUERIES]
    groups = split.caption_image[query], images
    image, similarity = top_k(split.text_emb[query], split.image_emb, max(HARDEST), groups)
    candidates["t2i"] = Pairs(np.broadcast_to(query[:, None], image.shape), image, similarity)
    return {
        f"{direction}_hardest_{count}": pairs[:, :count][np.isfinite(pairs.similarity[:, :count])]
        for direction, pairs in candidates.items()
        for count in HARDEST
    }


def quality(
    judges: Mapping[str, Judge],
    candidates: Mapping[str, Pairs],
    is_true: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns how good detectors are among the hardest candidates.

    `is_true` takes [n] captions and [n] images and returns whether they match in truth.

    Returns:
      By detector, and by the names of the candidates, what `detection_scores` returns. Where no
      query has a candidate there is nothing.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in judges}
    for among, pairs in candidates.items():
        if len(pairs):
            truth = is_true(pairs.caption, pairs.image)
            for name, judge in judges.items():
                judged = judge(pairs)
                found[name][among] = detection_scores(judged.probability, truth, judged.score)
    return found


def detection_scores(
    probability: np.ndarray, truth: np.ndarray, score: np.ndarray | None = None
) -> dict[str, Any]:
    """Returns how good a probability is at telling what is true.

    Args:
      probability: [n] probabilities, in [0, 1].
      truth: [n] bool, what is true.
      score: [n] by what candidates are ranked, the highest first; None for the probability.

    Returns:
      `roc_auc`, `average_precision` and `precision_at_recall_0.3`, the precision of the fewest of
      the highest scores among which is that share of what is true, with all of the last one's
      equals (each None where all or nothing is true); `density` (the share that is true),
      `mean_probability`, and `calibration`: for tenths of the probability, as far as they occur, a
      list of mean probability, share that is true, and number.
    """
    scores: dict[str, Any] = {
        "density": float(truth.mean()),
        "mean_probability": float(probability.mean()),
    }
    scores |= ranking_scores(probability if score is None else score, truth)
    tenth = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    scores["calibration"] = [
        [float(probability[tenth == b].mean()), float(truth[tenth == b].mean()), int(n)]
        for b, n in enumerate(np.bincount(tenth, minlength=_BINS))
        if n
    ]
    return scores


def ranking_scores(score: np.ndarray, truth: np.ndarray) -> Mapping[str, float | None]:
    """Returns `roc_auc`, `average_precision` and `precision_at_recall_0.3` of a ranking.

    Args:
      score: [n] by what candidates are ranked; equals are taken together.
      truth: [n] bool, what is true.
    """
    names = ("roc_auc", "average_precision", f"precision_at_recall_{RECALL}")
    matches, others = int(truth.sum()), int((~truth).sum())
    if not matches or not others:
        return dict.fromkeys(names)
    # Thresholds at each different score, the highest first.
    _, step = np.unique(-score, return_inverse=True)
    found = np.bincount(step, weights=truth)
    wrong = np.bincount(step, weights=~truth)
    true_positives, false_positives = np.cumsum(found), np.cumsum(wrong)
    precision = true_positives / (true_positives + false_positives)
    # A pair of a match and another is in order, or tied, which counts half.
    in_order = (wrong * (true_positives - found / 2)).sum()
    reached = int(np.argmax(true_positives >= RECALL * matches))
    values = (
        in_order / (matches * others),
        (found * precision).sum() / matches,
        precision[reached],
    )
    return dict(zip(names, map(float, values), strict=True))

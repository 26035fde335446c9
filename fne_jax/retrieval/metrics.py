"""Metrics of embeddings in memory: the labelled matches alone, or every true one."""

from __future__ import annotations

import numpy as np

from fne_jax.retrieval.query_scores import RECALL_AT, QueryScores, match_scores, rank_scores
from fne_jax.retrieval.ranked_lists import Matches
from fne_jax.retrieval.ranks import check_embeddings, match_ranks

# The metrics that `rsum` adds up.
RSUM_OF = tuple(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in RECALL_AT)


def retrieval_metrics(
    image_emb: np.ndarray, text_emb: np.ndarray, text_image_index: np.ndarray
) -> dict[str, float]:
    """Returns the standard recalls and ranks, where a caption matches its own image alone.

    Args:
      image_emb: [images, dim] L2-normalised embeddings.
      text_emb: [texts, dim] L2-normalised embeddings.
      text_image_index: [texts] integer row of `image_emb` that each caption describes. Every
        image needs a caption.

    Returns:
      For both directions (`i2t`, `t2i`) the percentages `_r1`, `_r5`, `_r10`, the median rank
      `_medr` and the mean rank `_meanr` (1 is best), and `rsum`, the sum of the six recalls. An
      image counts as found at the rank of its best-ranked caption; ties count against the model.

    Raises:
      ValueError: on shapes that do not fit, an index out of range, an image without captions, or
        an embedding that is not finite.
    """
    scores = label_scores(image_emb, text_emb, text_image_index)
    metrics = _named(scores)
    metrics["rsum"] = sum(metrics[name] for name in RSUM_OF)
    return metrics


def complete_metrics(
    image_emb: np.ndarray, text_emb: np.ndarray, matches: np.ndarray
) -> dict[str, float]:
    """Returns recalls and precisions against every true match, labelled or not.

    Args:
      image_emb: [images, dim] L2-normalised embeddings.
      text_emb: [texts, dim] L2-normalised embeddings.
      matches: [images, texts] bool, true where the caption is true of the image. Every image and
        every caption needs a match.

    Returns:
      For both directions, as percentages: `complete_i2t_r1` (and 5, 10), `..._r_precision` and
      `..._map_at_r`, see `match_scores`; and likewise `complete_t2i_...`.

    Raises:
      ValueError: on shapes that do not fit, a query without a match, or an embedding that is not
        finite.
    """
    owner = np.zeros(len(text_emb), int)  # groups queries for intervals alone
    scores = truth_scores(image_emb, text_emb, matches, owner)
    return {f"complete_{name}": value for name, value in _named(scores).items()}


def label_scores(
    image_emb: np.ndarray, text_emb: np.ndarray, text_image_index: np.ndarray
) -> dict[str, QueryScores]:
    """Returns both directions' scores where a caption matches its own image alone.

    Args and errors are those of `retrieval_metrics`.
    """
    ranks = match_ranks(image_emb, text_emb, text_image_index)
    return {
        "i2t": rank_scores(ranks.i2t, np.arange(len(image_emb)), len(text_emb)),
        "t2i": rank_scores(ranks.t2i, np.asarray(text_image_index), len(image_emb)),
    }


def truth_scores(
    image_emb: np.ndarray, text_emb: np.ndarray, matches: np.ndarray, text_image_index: np.ndarray
) -> dict[str, QueryScores]:
    """Returns both directions' scores against every true match.

    Args and errors are those of `complete_metrics` and `retrieval_metrics`.
    """
    image_emb, text_emb = np.asarray(image_emb), np.asarray(text_emb)
    check_embeddings(image_emb, text_emb)
    if matches.shape != (len(image_emb), len(text_emb)):
        raise ValueError(
            f"matches: expected shape {(len(image_emb), len(text_emb))}, got {matches.shape}"
        )
    i2t, t2i = Matches.of_matrix(matches), Matches.of_matrix(matches.T)
    return {
        "i2t": match_scores(image_emb, text_emb, i2t, np.arange(len(image_emb))),
        "t2i": match_scores(text_emb, image_emb, t2i, text_image_index),
    }


def _named(scores):
    return {
        f"{direction}_{name}": value
        for direction, of_direction in scores.items()
        for name, value in of_direction.metrics().items()
    }

"""Metrics of embeddings in memory: the labelled matches alone, or every true one.

An example: two images (rows) and four captions (columns), the first two of the first image and the
last two of the second, with these similarities:

                  0: "a cat"  1: "a pet"  2: "a dog"  3: "a walk"
    0, the cat       0.9         0.2         0.5         0.1
    1, the dog       0.3         0.7         0.6         0.4

Image to text, each row is sorted. The cat's first caption is 0, its own: found at rank 1. The
dog's are 1, another's, and then 2, its own: found at rank 2. One of two queries has a match first,
so `i2t_r1` is 50, and `i2t_r5` 100; the ranks' mean is `i2t_meanr`, 1.5.

Text to image, each column is. Captions 0, 2 and 3 find their image first and caption 1 finds it
second: `t2i_r1` is 75, and `t2i_meanr` 1.25.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from fne_jax.evaluation.ranks import check_embeddings, match_ranks
from fne_jax.evaluation.top_k import by_blocks, first_hits

# K of the recalls: the share of queries with a match among the first K.
RECALL_AT = (1, 5, 10)
# The metrics that `rsum` adds up.
RSUM_OF = tuple(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in RECALL_AT)


@dataclasses.dataclass(frozen=True)
class QueryScores:
    """What each query of one direction scored.

    Attributes:
      means: For each metric, [queries] floats whose mean is the metric.
      ranks: [queries] 0-based ranks, of which the median rank is taken, or None.
      image: [queries] int, the image that a query is or belongs to.
      candidates: The number of items that each query ranks.
    """

    means: dict[str, np.ndarray]
    ranks: np.ndarray | None
    image: np.ndarray
    candidates: int

    def metrics(self) -> dict[str, float]:
        """Returns the metrics: the means, and `medr`, the median rank from 1 without halves."""
        metrics = {name: float(values.mean()) for name, values in self.means.items()}
        if self.ranks is not None:
            metrics["medr"] = float(np.floor(np.median(self.ranks)) + 1)
        return metrics


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
      `..._map_at_r`, which `match_scores` defines; and likewise `complete_t2i_...`.

    Raises ValueError on shapes that do not fit, a query without a match, or an embedding that is
    not finite.
    """
    owner = np.zeros(len(text_emb), int)  # groups queries for intervals alone
    scores = truth_scores(image_emb, text_emb, matches, owner)
    return {f"complete_{name}": value for name, value in _named(scores).items()}


def label_scores(
    image_emb: np.ndarray, text_emb: np.ndarray, text_image_index: np.ndarray
) -> dict[str, QueryScores]:
    """Returns both directions' scores where a caption matches its own image alone.

    The arguments and errors are those of `retrieval_metrics`.
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

    The arguments are those of `complete_metrics`, and `text_image_index`, [texts] int, the image
    that each caption belongs to; so are the errors.
    """
    image_emb, text_emb = np.asarray(image_emb), np.asarray(text_emb)
    check_embeddings(image_emb, text_emb)
    if matches.shape != (len(image_emb), len(text_emb)):
        raise ValueError(
            f"matches: expected shape {(len(image_emb), len(text_emb))}, got {matches.shape}"
        )
    return {
        "i2t": match_scores(image_emb, text_emb, matches, np.arange(len(image_emb))),
        "t2i": match_scores(text_emb, image_emb, matches.T, text_image_index),
    }


def rank_scores(ranks: np.ndarray, image: np.ndarray, candidates: int) -> QueryScores:
    """Returns recalls in percent (`r1`, `r5`, `r10`) and ranks from 1 (`meanr`) of queries.

    Args:
      ranks: [queries] 0-based ranks, as `match_ranks` counts them.
      image: [queries] int, the image that a query is or belongs to.
      candidates: Number of items that each query ranks.
    """
    means = {f"r{k}": 100.0 * (ranks < k) for k in RECALL_AT}
    return QueryScores(means | {"meanr": ranks + 1.0}, ranks, image, candidates)


def match_scores(
    queries: np.ndarray,
    items: np.ndarray,
    matches: np.ndarray,
    image: np.ndarray,
    count: np.ndarray | None = None,
) -> QueryScores:
    """Returns scores against all matches of each query, in percent.

    `r1`, `r5`, `r10`: 100 where any match is among the first K; `r_precision`: the share of
    matches among the first R, R being the query's number of matches; `map_at_r`:
    `sum_{k<=R} precision(k) relevant(k) / R`. Ties count against the model.

    Args:
      queries: [queries, dim] L2-normalised embeddings.
      items: [items, dim] L2-normalised embeddings.
      matches: [queries, items] bool, true where an item matches.
      image: [queries] int, the image that a query is or belongs to.
      count: [queries] int, the number of each query's matches, at least one, where some are not
        among the items; None where all are.

    Raises ValueError, naming queries without a match.

    References:
      Musgrave et al., A Metric Learning Reality Check, ECCV 2020 (mAP@R); Chun et al., ECCV
      Caption, ECCV 2022 (its use for image-text retrieval).
    """
    counts = matches.sum(axis=1) if count is None else count
    lonely = np.flatnonzero(counts == 0)
    if len(lonely):
        raise ValueError(f"matches: queries without a match, rows {lonely[:10].tolist()}")
    depth = max(max(RECALL_AT), int(counts.max()))
    on_device = jax.device_put(items)

    def scores_of(part: slice) -> dict[str, np.ndarray]:
        count = counts[part]
        hits = first_hits(queries[part], on_device, matches[part], depth)
        rank = np.arange(1, hits.shape[1] + 1)
        counted = hits & (rank <= count[:, None])
        precision = np.cumsum(hits, axis=1) / rank
        shares = {f"r{k}": hits[:, :k].any(axis=1) for k in RECALL_AT}
        shares["r_precision"] = counted.sum(axis=1) / count
        shares["map_at_r"] = (precision * counted).sum(axis=1) / count
        return {name: 100.0 * np.asarray(values) for name, values in shares.items()}

    return QueryScores(by_blocks(len(queries), scores_of), None, image, len(items))


def _named(scores):
    return {
        f"{direction}_{name}": value
        for direction, of_direction in scores.items()
        for name, value in of_direction.metrics().items()
    }

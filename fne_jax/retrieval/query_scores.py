"""Scores of single queries, from which metrics and their intervals follow."""

from __future__ import annotations

import dataclasses

import numpy as np

from fne_jax.retrieval.ranked_lists import Matches, first_hits

RECALL_AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class QueryScores:
    """What each query of one direction scored.

    Attributes:
      means: by metric, [queries] floats whose mean is the metric.
      ranks: [queries] 0-based ranks, of which the median rank is taken, or None.
      image: [queries] int, the image that a query is or belongs to.
      candidates: number of items that each query ranks.
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


def rank_scores(ranks: np.ndarray, image: np.ndarray, candidates: int) -> QueryScores:
    """Returns recalls in percent (`r1`, `r5`, `r10`) and ranks from 1 (`meanr`) of queries.

    Args:
      ranks: [queries] of `match_ranks`.
      image: see `QueryScores`.
      candidates: see `QueryScores`.
    """
    means = {f"r{k}": 100.0 * (ranks < k) for k in RECALL_AT}
    return QueryScores(means | {"meanr": ranks + 1.0}, ranks, image, candidates)


def match_scores(
    queries: np.ndarray, gallery: np.ndarray, matches: Matches, image: np.ndarray
) -> QueryScores:
    """Returns scores against all matches of each query, in percent.

    `r1`, `r5`, `r10`: 100 where any match is among the first K; `r_precision`: the share of
    matches among the first R, R being the query's number of matches; `map_at_r`:
    `sum_{k<=R} precision(k) relevant(k) / R`. Ties count against the model.

    Args:
      queries: [queries, dim] L2-normalised embeddings.
      gallery: [gallery, dim] L2-normalised embeddings.
      matches: of the queries; each needs one.
      image: see `QueryScores`.

    Raises:
      ValueError: naming queries without a match.

    References:
      Musgrave et al., A Metric Learning Reality Check, ECCV 2020 (mAP@R); Chun et al., ECCV
      Caption, ECCV 2022 (its use for image-text retrieval).
    """
    lonely = np.flatnonzero(matches.count == 0)
    if len(lonely):
        raise ValueError(f"matches: queries without a match, rows {lonely[:10].tolist()}")
    names = [*(f"r{k}" for k in RECALL_AT), "r_precision", "map_at_r"]
    scores = {name: np.zeros(len(queries)) for name in names}
    for part, hits in first_hits(queries, gallery, matches, max(RECALL_AT)):
        count = matches.count[part]
        for k in RECALL_AT:
            scores[f"r{k}"][part] = hits[:, :k].any(axis=1)
        rank = np.arange(1, hits.shape[1] + 1)
        counted = hits & (rank <= count[:, None])
        precision = np.cumsum(hits, axis=1) / rank
        scores["r_precision"][part] = counted.sum(axis=1) / count
        scores["map_at_r"][part] = (precision * counted).sum(axis=1) / count
    means = {name: 100.0 * values for name, values in scores.items()}
    return QueryScores(means, None, image, len(gallery))

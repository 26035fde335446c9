"""Recall, rank and precision of cross-modal retrieval.

Ties count against the model: an item that does not match but is exactly as similar as the match
ranks before it. A collapsed model, all of whose embeddings are equal, so scores 0.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.objectives.similarity_statistics import cosine

# Rows of the similarity matrix held at once.
_BLOCK_ROWS = 256
RECALL_AT = (1, 5, 10)


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
      image counts as found at the rank of its best-ranked caption.

    Raises:
      ValueError: on shapes that do not fit, an index out of range, an image without captions, or
        an embedding that is not finite.
    """
    image_emb, text_emb = np.asarray(image_emb), np.asarray(text_emb)
    owner = np.asarray(text_image_index)
    _check_embeddings(image_emb, text_emb)
    if owner.shape != (len(text_emb),):
        raise ValueError(f"text_image_index: expected shape ({len(text_emb)},), got {owner.shape}")
    if owner.min() < 0 or owner.max() >= len(image_emb):
        raise ValueError(
            f"text_image_index: expected rows 0 to {len(image_emb) - 1}, "
            f"got {owner.min()} to {owner.max()}"
        )
    lonely = np.setdiff1d(np.arange(len(image_emb)), owner)
    if len(lonely):
        raise ValueError(f"images without a caption cannot be ranked: rows {lonely[:10].tolist()}")

    i2t = _ranks(image_emb, text_emb, np.arange(len(image_emb)), owner)
    t2i = _ranks(text_emb, image_emb, owner, np.arange(len(image_emb)))
    metrics = _rank_metrics("i2t", i2t) | _rank_metrics("t2i", t2i)
    metrics["rsum"] = sum(metrics[f"{d}_r{k}"] for d in ("i2t", "t2i") for k in RECALL_AT)
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
      For both directions, as percentages: `complete_i2t_r1` (and 5, 10), the share of queries with
      any match among the first K; `complete_i2t_r_precision`, the share of matches among the
      first R, R being the query's number of matches; `complete_i2t_map_at_r`, the mean over
      queries of `sum_{k<=R} precision(k) relevant(k) / R`; and likewise `complete_t2i_...`.

    Raises:
      ValueError: on shapes that do not fit, a query without a match, or an embedding that is not
        finite.

    References:
      Musgrave et al., A Metric Learning Reality Check, ECCV 2020 (mAP@R); Chun et al., ECCV
      Caption, ECCV 2022 (its use for image-text retrieval).
    """
    image_emb, text_emb = np.asarray(image_emb), np.asarray(text_emb)
    _check_embeddings(image_emb, text_emb)
    if matches.shape != (len(image_emb), len(text_emb)):
        raise ValueError(
            f"matches: expected shape {(len(image_emb), len(text_emb))}, got {matches.shape}"
        )
    metrics = {}
    for direction, queries, gallery, relevant in (
        ("i2t", image_emb, text_emb, matches),
        ("t2i", text_emb, image_emb, matches.T),
    ):
        for name, value in _complete_direction(queries, gallery, relevant).items():
            metrics[f"complete_{direction}_{name}"] = value
    return metrics


def _check_embeddings(image_emb, text_emb):
    if image_emb.ndim != 2 or text_emb.ndim != 2 or image_emb.shape[1] != text_emb.shape[1]:
        raise ValueError(
            "image_emb and text_emb: expected [images, dim] and [texts, dim], "
            f"got {image_emb.shape} and {text_emb.shape}"
        )
    for name, array in (("image_emb", image_emb), ("text_emb", text_emb)):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad):
            raise ValueError(f"{name}: not finite in {len(bad)} rows, first {bad[:10].tolist()}")


def _ranks(queries, gallery, query_label, gallery_label):
    """Returns each query's 0-based rank of its best match: the count of other items before it."""
    ranks = []
    for start in range(0, len(queries), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        ranks.append(_block_ranks(queries[rows], gallery, query_label[rows], gallery_label))
    return np.concatenate(ranks)


@jax.jit
def _block_ranks(queries, gallery, query_label, gallery_label):
    similarity = cosine(queries, gallery)
    own = query_label[:, None] == gallery_label[None, :]
    best = jnp.where(own, similarity, -jnp.inf).max(axis=1, keepdims=True)
    return (~own & (similarity >= best)).sum(axis=1)


def _rank_metrics(direction, ranks):
    metrics = {f"{direction}_r{k}": 100.0 * float((ranks < k).mean()) for k in RECALL_AT}
    metrics[f"{direction}_medr"] = float(np.floor(np.median(ranks)) + 1)
    metrics[f"{direction}_meanr"] = float(ranks.mean() + 1)
    return metrics


def _complete_direction(queries, gallery, relevant):
    if not relevant.any(axis=1).all():
        lonely = np.flatnonzero(~relevant.any(axis=1))
        raise ValueError(f"matches: queries without a match, rows {lonely[:10].tolist()}")
    sums = functools.reduce(
        lambda total, block: {k: total[k] + block[k] for k in block},
        (
            _complete_block(queries[s : s + _BLOCK_ROWS], gallery, relevant[s : s + _BLOCK_ROWS])
            for s in range(0, len(queries), _BLOCK_ROWS)
        ),
    )
    return {name: 100.0 * float(value) / len(queries) for name, value in sums.items()}


def _complete_block(queries, gallery, relevant):
    """Returns the sums over a block of queries of each metric as a fraction."""
    similarity = np.asarray(cosine(queries, gallery))
    # Sorted by similarity downwards and, among equals, those that do not match first.
    order = np.lexsort((relevant, -similarity), axis=1)
    hits = np.take_along_axis(relevant, order, axis=1)
    count = relevant.sum(axis=1)
    found = np.cumsum(hits, axis=1)
    rank = np.arange(1, hits.shape[1] + 1)
    within = rank[None, :] <= count[:, None]
    sums = {f"r{k}": hits[:, :k].any(axis=1).sum() for k in RECALL_AT}
    sums["r_precision"] = ((hits & within).sum(axis=1) / count).sum()
    sums["map_at_r"] = ((found / rank * hits * within).sum(axis=1) / count).sum()
    return sums

"""Scores of a split, and the files and table that report them."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np

from fne_jax.data.datasets import PairDataset
from fne_jax.retrieval.embed import Embedder
from fne_jax.retrieval.metrics import complete_metrics, retrieval_metrics


def evaluate_split(
    embedder: Embedder, params: Any, dataset: PairDataset, tokens: tuple[np.ndarray, np.ndarray]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns a split's metrics and samples of its similarities.

    The samples, for histograms, are of the `positive` pairs (a caption with its image) and of
    `negative` ones (with the next image).
    """
    image_emb, text_emb = embed_split(embedder, params, dataset, tokens)
    following = (dataset.caption_image + 1) % len(image_emb)
    samples = {
        "positive": (text_emb * image_emb[dataset.caption_image]).sum(axis=1),
        "negative": (text_emb * image_emb[following]).sum(axis=1),
    }
    return split_metrics(image_emb, text_emb, dataset), samples


def embed_split(
    embedder: Embedder, params: Any, dataset: PairDataset, tokens: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the [images, dim] and [captions, dim] embeddings of a split."""
    return embedder.images(params, dataset), embedder.texts(params, tokens)


def split_metrics(
    image_emb: np.ndarray, text_emb: np.ndarray, dataset: PairDataset
) -> dict[str, float]:
    """Returns a split's metrics; `complete_...` are those against the complete truth, if known."""
    metrics = retrieval_metrics(image_emb, text_emb, dataset.caption_image)
    if dataset.truth is not None:
        metrics |= complete_metrics(image_emb, text_emb, dataset.truth.matrix())
    return metrics


def write_report(path: pathlib.Path, metrics: dict[str, float], about: dict[str, Any]) -> None:
    """Writes `{"metrics": ..., **about}` as JSON; the file is always whole."""
    scratch = path.with_suffix(".incomplete")
    scratch.write_text(json.dumps({"metrics": metrics, **about}, indent=2) + "\n")
    os.replace(scratch, path)


def format_table(metrics: dict[str, float]) -> str:
    """Returns recalls and ranks of both directions as lines for a terminal."""
    columns = ("R@1", "R@5", "R@10", "median", "mean rank")
    lines = [f"{'':28}" + "".join(f"{name:>11}" for name in columns)]
    names = (("i2t", "image to text"), ("t2i", "text to image"))
    for direction, title in names:
        values = [metrics[f"{direction}_{k}"] for k in ("r1", "r5", "r10", "medr", "meanr")]
        lines.append(f"{title:28}" + "".join(f"{value:11.1f}" for value in values))
    lines.append(f"rSum {metrics['rsum']:.1f}")
    if "complete_i2t_r1" in metrics:
        columns = ("R@1", "R@5", "R@10", "R-Prec", "mAP@R")
        lines.append(
            f"\n{'against the complete truth':28}" + "".join(f"{name:>11}" for name in columns)
        )
        keys = ("r1", "r5", "r10", "r_precision", "map_at_r")
        for direction, title in names:
            values = [metrics[f"complete_{direction}_{key}"] for key in keys]
            lines.append(f"{title:28}" + "".join(f"{value:11.1f}" for value in values))
    return "\n".join(lines)

"""Scores of a split, and the files and table that report them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fne_jax.evaluation import intervals
from fne_jax.evaluation.metric_names import DIRECTIONS, RETRIEVAL, TRUTHS
from fne_jax.evaluation.metrics import complete_metrics, retrieval_metrics
from fne_jax.evaluation.protocols import Measurement
from fne_jax.files import as_user_error, write_atomically
from fne_jax.model.embedded_split import EmbeddedSplit


def score_split(split: EmbeddedSplit) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns a split's metrics and samples of its similarities.

    The samples, for histograms, are of the `positive` pairs (a caption with its image) and of
    `negative` ones (with the next image).
    """
    image_emb, text_emb, owner = split.image_emb, split.text_emb, split.caption_image
    metrics = retrieval_metrics(image_emb, text_emb, owner)
    if split.truth is not None:
        metrics |= complete_metrics(image_emb, text_emb, split.truth)
    following = (owner + 1) % len(image_emb)
    samples = {
        "positive": (text_emb * image_emb[owner]).sum(axis=1),
        "negative": (text_emb * image_emb[following]).sum(axis=1),
    }
    return metrics, samples


def write_report(
    path: pathlib.Path, measured: Mapping[str, Measurement], about: Mapping[str, Any]
) -> None:
    """Writes `{"metrics": {name: {"value", "low", "high", ...}}, **about}` as JSON.

    `read_values` reads its metrics.

    Raises:
      UserError: if it cannot be written.
    """
    report = {
        "metrics": {name: one.as_json() for name, one in measured.items()},
        **about,
        "intervals": {
            "percent": intervals.LEVEL,
            "method": "bootstrap percentiles; images are drawn, with their captions",
            "resamples": intervals.RESAMPLES,
        },
    }
    with as_user_error(f"{path}: cannot be written"):
        write_atomically(path, json.dumps(report, indent=2) + "\n")


def read_values(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a read report as numbers, with or without intervals."""
    return {
        name: entry["value"] if isinstance(entry, Mapping) else entry
        for name, entry in report["metrics"].items()
    }


def format_table(measured: Mapping[str, Measurement]) -> str:
    """Returns each protocol's metrics and intervals, both directions, as lines for a terminal."""
    tables = []
    for truth, title in TRUTHS.items():
        keys = [key for key in RETRIEVAL if f"{truth}i2t_{key}" in measured]
        if not keys:
            continue
        lines = [f"{title:28}" + "".join(f"{RETRIEVAL[key].heading:>13}" for key in keys)]
        for name, direction in DIRECTIONS.items():
            row = [(RETRIEVAL[key], measured[f"{truth}{name}_{key}"]) for key in keys]
            values = (metric.text(one.value) for metric, one in row)
            spans = (f"{metric.text(one.low)}-{metric.text(one.high)}" for metric, one in row)
            lines.append(f"{direction.title:28}" + "".join(f"{value:>13}" for value in values))
            lines.append(f"{'  95 % interval':28}" + "".join(f"{span:>13}" for span in spans))
        if f"{truth}rsum" in measured:
            one = measured[f"{truth}rsum"]
            lines.append(f"rSum {one.value:.1f} ({one.low:.1f}-{one.high:.1f})")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)

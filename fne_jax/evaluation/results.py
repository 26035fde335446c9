"""Scores of a split, and the files, the table and the sentences that report them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fne_jax.evaluation import intervals
from fne_jax.evaluation.metric_names import COMPLETE, DIRECTIONS, RETRIEVAL, TRUTHS, WARMUP
from fne_jax.evaluation.metrics import RECALL_AT, RSUM_OF, complete_metrics, retrieval_metrics
from fne_jax.evaluation.protocols import Measurement
from fne_jax.files import as_user_error, write_atomically
from fne_jax.model.embedded_split import EmbeddedSplit

_SAMPLED, _HARDEST = "sampled_false_negative_rate", "hardest_false_negative_rate"


def score_split(split: EmbeddedSplit) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns a split's metrics and samples of its similarities.

    The samples, for histograms, are of the `positive` pairs (a caption with its image) and of
    `negative` ones (with the next image).
    """
    metrics = retrieval_metrics(split.image_emb, split.text_emb, split.caption_image)
    if split.truth is not None:
        metrics |= complete_metrics(split.image_emb, split.text_emb, split.truth)
    following = (split.caption_image + 1) % len(split.image_emb)
    captions = np.arange(len(split.text_emb))
    negative = split.similarity(captions, following)
    return metrics, {"positive": split.own_similarity, "negative": negative}


def write_report(
    path: pathlib.Path, measured: Mapping[str, Measurement], about: Mapping[str, Any]
) -> None:
    """Writes `{"metrics": {name: {"value", "low", "high", ...}}, **about}` as JSON.

    `read_values` reads its metrics.

    Raises UserError if it cannot be written.
    """
    report = {
        "metrics": {name: dataclasses.asdict(one) for name, one in measured.items()},
        **about,
        "intervals": {
            "percent": intervals.LEVEL,
            "method": "Wilson's, with the variance of a bootstrap in which images are drawn with "
            "their captions; of ranks its percentiles",
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


def chance_levels(split: EmbeddedSplit) -> dict[str, float]:
    """Returns the expected recalls of random ranks, in percent, by the names of the metrics.

    `rsum` is the sum of the six by the labels. Those against every true match, `complete_...`, are
    there where that is known.
    """
    images, captions = split.image_emb.shape[0], split.text_emb.shape[0]
    labels = np.bincount(split.caption_image, minlength=images)
    matches = {"": {"i2t": (labels, captions), "t2i": (np.ones(captions, int), images)}}
    if split.truth is not None:
        truth = split.truth
        matches[COMPLETE] = {"i2t": (truth.sum(axis=1), captions), "t2i": (truth.sum(0), images)}
    levels = {
        f"{source}{direction}_r{first}": 100 * float(_hit_rate(count, candidates, first).mean())
        for source, directions in matches.items()
        for direction, (count, candidates) in directions.items()
        for first in RECALL_AT
    }
    return levels | {"rsum": sum(levels[name] for name in RSUM_OF)}


def _hit_rate(matches, candidates, first):
    """Returns [queries], the chance of any of `matches` among the first of so many candidates."""
    place = np.arange(min(first, candidates))
    missed = (candidates - matches[:, None] - place) / (candidates - place)
    return 1 - np.maximum(missed, 0).prod(axis=1)


def what_was_learnt(
    values: Mapping[str, float], log: Sequence[Mapping[str, float]], images: int
) -> list[str]:
    """Returns sentences on how well captions find images, on the truth, and on the negatives.

    The log is the lines of metrics.jsonl; the captions had so many `images` to choose from.
    """
    labels = values["t2i_r1"]
    lines = [
        f"A caption finds its own image first among {images:,} in {labels:.1f} % of cases; "
        f"by chance it would in {100 / images:.3g} %."
    ]
    complete = values.get(f"{COMPLETE}t2i_r1")
    if complete is None:
        lines.append(
            "How many of the others are right too nobody labelled; `audit` shows the likeliest."
        )
    else:
        lines.append(
            f"The first image fits the caption in {complete:.1f} %, if all that is true counts: in "
            f"{max(complete - labels, 0):.1f} % it is right though nobody labelled it."
        )
    return [*lines, _of_negatives(log)]


def _of_negatives(log):
    # Steps that named no negative have no rate.
    rates = [line for line in log if {_SAMPLED, _HARDEST} <= line.keys() and not line.get(WARMUP)]
    if rates:
        sampled, hardest = (
            100 * sum(line[name] for line in rates) / len(rates) for name in (_SAMPLED, _HARDEST)
        )
        return (
            f"Of the negatives that it was trained with, {sampled:.1f} % were in truth matches; of "
            f"the hardest ones, {hardest:.1f} %."
        )
    # Two losses, of which neither is high or low beside the other.
    warmup, after = (
        [line["loss"] for line in log if "loss" in line and line.get(WARMUP, 0) == share]
        for share in (1, 0)
    )
    told = []
    if len(warmup) > 1:
        told.append(f"from {warmup[0]:.3f} to {warmup[-1]:.3f} in the warm-up")
    if len(after) > 1:
        told.append(f"from {after[0]:.3f} to {after[-1]:.3f}{' after it' if warmup else ''}")
    if not told:
        return "It was trained for too few steps to say more."
    return f"The loss went {', and '.join(told)}."

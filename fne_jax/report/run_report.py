"""A page about an evaluation: what it found, and what FNE does with the candidates."""

from __future__ import annotations

import datetime
import importlib.metadata
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import markupsafe
import matplotlib  # noqa: F401  imported late in figures; without it there is no page
import ml_collections

from fne_jax import configuration
from fne_jax.evaluation.metric_names import COMPLETE, DIRECTIONS, JUDGED, RETRIEVAL
from fne_jax.evaluation.results import chance_levels
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.objectives.similarity_statistics import can_suspect
from fne_jax.report import example_cards, figures, html

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers"),
    *("ml-collections", "tensorflow-cpu", "tensorflow", "tensorflow-datasets", "clu"),
)


def write_run_report(
    path: pathlib.Path,
    split: EmbeddedSplit,
    metrics: Mapping[str, Any],
    weights: str = "",
    log: Sequence[Mapping[str, float]] = (),
) -> None:
    """Writes the page of an evaluation; what is not known of the split is left out of it.

    A metric is a number or `{"value", "low", "high"}`. Weights are `online`, `momentum`, or "" for
    embeddings of any other model; the log is the lines of metrics.jsonl. Raises UserError if the
    file cannot be written.
    """
    config, chance = split.config, chance_levels(split)
    page = html.render(
        "report.html",
        {
            "name": split.name,
            "split": split.split_name,
            "step": split.step,
            "weights": weights,
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
            "data": None if config is None else dataset_name(config.data),
            "images": len(split.image_emb),
            "captions": len(split.text_emb),
            "rsum": _value(metrics["rsum"], chance["rsum"]) if "rsum" in metrics else None,
            "tables": metric_tables(metrics, chance),
            "curves": _labelled(figures.learning_curves(log)),
            "config": None if config is None else configuration.flatten(config),
            "environment": environment(),
            **_of_statistics(split),
            **_of_examples(split),
        },
    )
    html.write_text(path, page)


def dataset_name(data: ml_collections.ConfigDict) -> str:
    """Returns what a page calls a dataset: its source, and the last part of its folder."""
    folder = pathlib.PurePath(data.dir).name
    return f"{data.source} ({folder})" if folder and folder != data.source else data.source


def _of_statistics(split: EmbeddedSplit) -> dict[str, Any]:
    config, stats = split.config, split.stats
    if config is None or stats is None:
        return {"statistics": None, "figures_of_statistics": {}, "suspects": False}
    return {
        "statistics": _statistics_values(stats),
        "figures_of_statistics": _labelled(figures.statistics_figures(stats, config.fne)),
        "suspects": can_suspect(stats, config.fne.min_count),
        "fne": config.fne,
        "objective": config.objective.name,
    }


def _of_examples(split: EmbeddedSplit) -> dict[str, Any]:
    config, stats = split.config, split.stats
    if split.dataset is None or len(split.image_emb) < 2:
        return {"negatives": [], "queries": []}
    negatives = []
    if config is not None and stats is not None and can_suspect(stats, config.fne.min_count):
        negatives = [example_cards.negatives(split, way) for way in DIRECTIONS]
    return {"negatives": negatives, "queries": example_cards.queries(split)}


def metric_tables(metrics: Mapping[str, Any], chance: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns the metrics as tables.

    A metric is a number or `{"value", "low", "high"}`; `chance` has the values of random ranks, as
    far as they are known.

    Returns:
      Of each table `title`, `columns` and `rows` of `name`, `meaning` and `cells`; a cell has a
      `text`, and what stands below it, `interval` and `chance`, or "".
    """
    tables, shown = [], {"rsum"}
    columns = [direction.title for direction in DIRECTIONS.values()]
    titles = {
        "": "Labelled matches",
        COMPLETE: "All true matches, labelled or not",
        JUDGED: "By verdicts on the first results of random queries",
    }
    for truth, title in titles.items():
        rows = []
        for key, metric in RETRIEVAL.items():
            names = [f"{truth}{direction}_{key}" for direction in DIRECTIONS]
            if all(name in metrics for name in names):
                shown.update(names)
                cells = [_value(metrics[name], chance.get(name)) for name in names]
                rows.append({"name": metric.heading, "meaning": metric.meaning, "cells": cells})
        if rows:
            tables.append({"title": title, "columns": columns, "rows": rows})
    others = [
        {"name": name, "meaning": _definition(value), "cells": [_value(value)]}
        for name, value in metrics.items()
        if name not in shown
    ]
    if others:
        tables.append({"title": "Further metrics", "columns": ["value"], "rows": others})
    return tables


def environment() -> dict[str, str]:
    """Returns the versions and devices of this process."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": str(jax.process_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    } | versions


def _value(value, chance=None):
    known = value if isinstance(value, Mapping) else {"value": value}
    interval = f"{known['low']:.1f} to {known['high']:.1f}" if "low" in known else ""
    return {
        "text": f"{known['value']:.1f}",
        "interval": interval,
        "chance": "" if chance is None else f"{chance:.1f}",
    }


def _definition(value):
    return value.get("definition", "") if isinstance(value, Mapping) else ""


def _labelled(plotted):
    # What matplotlib writes holds no text of the dataset.
    return {
        title: markupsafe.Markup(figures.as_svg(figure, title)) for title, figure in plotted.items()
    }


def _statistics_values(stats):
    return {
        name: {
            "mean": float(gaussian.mean),
            "deviation": float(gaussian.variance) ** 0.5,
            "count": int(gaussian.count),
        }
        for name, gaussian in (("positive", stats.positive), ("negative", stats.negative))
    }

"""`report.html`: what an evaluation found, and what FNE does with the run's candidates."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import matplotlib  # noqa: F401  imported late in figures; without it there is no page
import numpy as np

from fne_jax import configuration, figures
from fne_jax.data.pairs import PairDataset
from fne_jax.model.model import Model
from fne_jax.report import example_cards, html
from fne_jax.retrieval.metric_names import COMPLETE, DIRECTIONS, RETRIEVAL
from fne_jax.training import metric_log

FILE_NAME = "report.html"

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers"),
    *("ml-collections", "tensorflow-cpu", "tensorflow", "tensorflow-datasets", "clu"),
)


def write_run_report(
    workdir: pathlib.Path,
    model: Model,
    dataset: PairDataset,
    image_emb: np.ndarray,
    text_emb: np.ndarray,
    metrics: Mapping[str, Any],
    split: str,
) -> pathlib.Path:
    """Writes `report.html` into a run's folder and returns its path.

    Args:
      workdir: The run's folder; its metrics.jsonl gives the learning curves.
      model: The model of the run, with its statistics.
      dataset: The evaluated split.
      image_emb: [images, dim] L2-normalised embeddings of the split.
      text_emb: [captions, dim] L2-normalised embeddings of the split.
      metrics: The metrics by name, each a number or `{"value", "low", "high"}`.
      split: The name of the split.

    Raises:
      UserError: if the file cannot be written.
    """
    config, stats = model.config, jax.device_get(model.stats)
    of_statistics = figures.statistics_figures(stats, config.fne)
    directions = example_cards.directions(dataset, image_emb, text_emb)
    comparable = len(dataset.image_id) > 1
    page = html.render(
        "report.html",
        {
            "run": workdir.resolve().name,
            "split": split,
            "step": model.step,
            "images": len(dataset.image_id),
            "captions": len(dataset.captions),
            "rsum": _value_text(metrics["rsum"]) if "rsum" in metrics else None,
            "tables": metric_tables(metrics),
            "curves": _labelled(_learning_curves(workdir)),
            "statistics": _statistics_values(stats),
            "figures_of_statistics": _labelled(of_statistics),
            "galleries": [
                example_cards.gallery(direction, config.seed, stats, config.fne)
                for direction in directions
                if comparable and of_statistics
            ],
            "queries": [example_cards.queries(d) for d in directions if comparable],
            "fne": config.fne,
            "objective": config.objective.name,
            "config": configuration.flatten(config),
            "environment": environment(),
        },
    )
    path = workdir / FILE_NAME
    html.write_text(path, page)
    return path


def metric_tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the metrics as tables: `title`, `columns` and `rows` of name, meaning and values."""
    tables, shown = [], {"rsum"}
    columns = [direction.title for direction in DIRECTIONS.values()]
    for truth, title in (("", "Labelled matches"), (COMPLETE, "All true matches, labelled or not")):
        rows = []
        for key, metric in RETRIEVAL.items():
            names = [f"{truth}{direction}_{key}" for direction in DIRECTIONS]
            if all(name in metrics for name in names):
                shown.update(names)
                values = [_value_text(metrics[name]) for name in names]
                rows.append({"name": metric.heading, "meaning": metric.meaning, "values": values})
        if rows:
            tables.append({"title": title, "columns": columns, "rows": rows})
    others = [
        {"name": name, "meaning": _definition(value), "values": [_value_text(value)]}
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


def _value_text(value):
    if isinstance(value, Mapping):
        text = f"{value['value']:.1f}"
        return f"{text} ({value['low']:.1f} to {value['high']:.1f})" if "low" in value else text
    return f"{value:.1f}"


def _definition(value):
    return value.get("definition", "") if isinstance(value, Mapping) else ""


def _learning_curves(workdir):
    if not (workdir / metric_log.FILE_NAME).exists():
        return {}
    return figures.learning_curves(metric_log.read_metrics(workdir))


def _labelled(plotted):
    return {
        title: html.svg_markup(figures.as_svg(figure, title)) for title, figure in plotted.items()
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

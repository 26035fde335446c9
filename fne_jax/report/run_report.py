"""`report.html`: what an evaluation found, and what FNE does with the run's candidates."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fne_jax import configuration, figures
from fne_jax.data.pairs import PairDataset
from fne_jax.model.model import Model
from fne_jax.report import example_cards, html
from fne_jax.training import metric_log

FILE_NAME = "report.html"

_DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers"),
    *("ml-collections", "tensorflow-cpu", "tensorflow", "tensorflow-datasets", "clu"),
)
# Of a metric's name without its direction.
_MEANINGS = {
    "r1": "% of queries whose first result matches",
    "r5": "% with a match among the first 5",
    "r10": "% with a match among the first 10",
    "medr": "median place of the first match, 1 is best",
    "meanr": "mean place of the first match, 1 is best",
    "r_precision": "% of matches among the first R results, R being their number",
    "map_at_r": "% mean average precision within the first R results",
}
_NAMES = {
    **{"r1": "R@1", "r5": "R@5", "r10": "R@10", "medr": "median rank", "meanr": "mean rank"},
    **{"r_precision": "R-Precision", "map_at_r": "mAP@R"},
}


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
      workdir: the run's folder; its metrics.jsonl gives the learning curves.
      model: The model of the run, with its statistics.
      dataset: the evaluated split.
      image_emb: [images, dim] its L2-normalised embeddings.
      text_emb: [captions, dim].
      metrics: by name, a number or `{"value", "low", "high"}`.
      split: name of the split.

    Raises:
      UserError: if the file cannot be written.
    """
    config, stats = model.config, jax.device_get(model.stats)
    drawn = figures.statistics_figures(stats, config.fne)
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
            "figures_of_statistics": _labelled(drawn),
            "galleries": [
                example_cards.gallery(direction, config.seed, stats, config.fne)
                for direction in directions
                if comparable and drawn
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
    for prefix, title in (
        ("", "Labelled matches"),
        ("complete_", "All true matches, labelled or not"),
    ):
        rows = []
        for key, meaning in _MEANINGS.items():
            names = [f"{prefix}{direction}_{key}" for direction in _DIRECTIONS]
            if all(name in metrics for name in names):
                shown.update(names)
                values = [_value_text(metrics[name]) for name in names]
                rows.append({"name": _NAMES[key], "meaning": meaning, "values": values})
        if rows:
            tables.append({"title": title, "columns": list(_DIRECTIONS.values()), "rows": rows})
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


def _labelled(drawn):
    return {
        title: html.svg_markup(figures.as_svg(figure, title)) for title, figure in drawn.items()
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

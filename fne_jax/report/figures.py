"""Figures of a run, for its report (SVG) and for TensorBoard (pixels)."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fne_jax.evaluation.metric_names import WARMUP, describe
from fne_jax.objectives.negative_sampling import sampling_weights
from fne_jax.objectives.registry import weighing_settings
from fne_jax.objectives.similarity_statistics import (
    GaussianStatistics,
    SimilarityStatistics,
    false_negative_posterior,
)

# matplotlib is imported late throughout: training can do without it.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)

# Text and axes: dark on TensorBoard's white, the page's text colour in an SVG.
_INK = "#1f2329"
# Of lines and areas; each is readable on white and on near-black.
BLUE, ORANGE, GREEN, GREY = "#3b82c4", "#d9662b", "#2f9e62", "#8a8f98"
# Inches. Small, so that the text stays readable where a page is as narrow as a phone.
_SIZE = (4.2, 3.0)
_STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
}

# Of the lines of a figure: colour, width and dashes, so that each shows where they coincide.
_LINES = ((BLUE, 5.0, "-"), (ORANGE, 2.4, "-"), (GREEN, 1.2, (0, (4, 3))))

# Title of a figure, and its curves' names in metrics.jsonl.
CURVES = {
    "Validation recall, %": ("eval_i2t_r1", "eval_t2i_r1"),
    "Similarities that the statistics see": ("positive_mean", "negative_mean"),
    "Negatives that are in truth matches, %": (
        "hardest_false_negative_rate",
        "sampled_false_negative_rate",
    ),
}

# The (step, value) points of a figure's curves, by their legends.
Curves = dict[str, list[tuple[float, float]]]


@contextlib.contextmanager
def style(**more: Any) -> Iterator[None]:
    """Lets figures be made and written in this package's style, within a block or a function.

    Args:
      **more: further settings of matplotlib, with `_` for the points in their names.
    """
    import matplotlib

    settings = {name.replace("_", ".", 1): value for name, value in more.items()}
    with matplotlib.rc_context(_STYLE | settings):
        yield


def logged_curves(lines: Sequence[Mapping[str, float]]) -> dict[str, Curves]:
    """Returns what was logged of the losses and of each entry of `CURVES`, by title.

    The warm-up's loss is a curve of its own: it is another loss, of another scale.

    Args:
      lines: The lines of a run's metrics.jsonl, in order.
    """
    end = _warmup_end(lines)
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    found = {"Training loss": {"loss": losses}}
    if end:
        found = {
            "Loss of the warm-up": {"loss": [point for point in losses if point[0] <= end]},
            "Loss after the warm-up": {"loss": [point for point in losses if point[0] > end]},
        }
    for title, names in CURVES.items():
        found[title] = {}
        for name in names:
            metric = describe(name)
            found[title][metric.legend] = [
                (line["step"], line[name] * metric.scale) for line in lines if name in line
            ]
    known = {
        title: {legend: points for legend, points in curves.items() if points}
        for title, curves in found.items()
    }
    return {title: curves for title, curves in known.items() if curves}


def _warmup_end(lines):
    """Returns the last step of the warm-up that was logged, or 0."""
    return max((line["step"] for line in lines if line.get(WARMUP)), default=0)


@style()
def learning_curves(lines: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """Returns a figure for each of `logged_curves`, by title."""
    figures, end = {}, _warmup_end(lines)
    for title, curves in logged_curves(lines).items():
        figure, axes = _new_figure()
        looks = _LINES if len(curves) > 1 else ((BLUE, 2.0, "-"),)
        for (colour, width, dashes), (label, points) in zip(looks, curves.items(), strict=False):
            mark = "o" if len(points) < 40 else ""
            look = {"color": colour, "lw": width, "ls": dashes, "marker": mark, "ms": width + 1}
            axes.plot(*zip(*points, strict=True), label=label, **look)
        steps = [step for points in curves.values() for step, _ in points]
        if min(steps) < end < max(steps):
            axes.axvline(end, color=GREY, ls=":", label="end of the warm-up")
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if title.startswith("Negatives"):
            axes.set_ylim(bottom=0)
        # Above the axes, where there are no lines.
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside upper center", ncols=2)
        figures[title] = figure
    return figures


@style()
def statistics_figures(
    stats: SimilarityStatistics, fne: ml_collections.ConfigDict
) -> dict[str, Figure]:
    """Returns what the statistics mean for candidates; nothing before they have seen two pairs.

    Returns:
      `similarity_distributions`: both Gaussians, the posterior, and where the margin cuts.
      `sampling_weights`: a candidate's weight by its similarity, for three positive similarities.
    """
    if stats.positive.count < 2 or stats.negative.count < 2:
        return {}
    return {
        "similarity_distributions": _distributions(stats, fne),
        "sampling_weights": _weights(stats, fne),
    }


def statistics_images(
    stats: SimilarityStatistics, fne: ml_collections.ConfigDict
) -> dict[str, np.ndarray]:
    """Returns `statistics_figures` as [1, height, width, 3] uint8, as TensorBoard takes them.

    None, with a warning, where matplotlib is not installed.
    """
    try:
        figures = statistics_figures(jax.device_get(stats), fne)
        return {name: as_pixels(figure)[None] for name, figure in figures.items()}
    except ImportError as error:
        _log.warning("no figures in TensorBoard: pip install %s", error.name)
        return {}


def as_svg(figure: Figure, name: str) -> str:
    """Returns an SVG element without size or colours of its own for text and axes.

    The name tells the ids inside it from those of a page's other figures.
    """
    stream = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style(svg_hashsalt=name):
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Its page labels it, and gives it the width that there is.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 aria-hidden="true"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Groups have names that repeat from figure to figure; nothing refers to them.
    return re.sub(r'<g id="[^"]*"', "<g", text)


def as_pixels(figure: Figure) -> np.ndarray:
    """Returns a figure as [height, width, 3] uint8, on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    figure.set_facecolor("white")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _new_figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=110, layout="constrained")
    return figure, figure.add_subplot()


def _similarity_range(stats):
    """Returns the similarities that either distribution reaches, and the margin's surroundings."""
    ends = [
        g.mean + side * 4 * jnp.sqrt(g.variance)
        for g in (stats.positive, stats.negative)
        for side in (-1, 1)
    ]
    return np.linspace(max(min(map(float, ends)), -1), min(max(map(float, ends)), 1), 400)


def _density(similarity, gaussian: GaussianStatistics):
    deviation = max(float(gaussian.variance) ** 0.5, 1e-4)
    z = (similarity - float(gaussian.mean)) / deviation
    return np.exp(-0.5 * z**2) / (deviation * np.sqrt(2 * np.pi))


def _distributions(stats, fne):
    figure, axes = _new_figure()
    similarity = _similarity_range(stats)
    for gaussian, colour, label in (
        (stats.negative, ORANGE, "hardest negatives"),
        (stats.positive, BLUE, "matching pairs"),
    ):
        density = _density(similarity, gaussian)
        axes.fill_between(similarity, density, color=colour, alpha=0.35, lw=0, label=label)
        axes.plot(similarity, density, color=colour, lw=1)
    cut = float(stats.positive.mean) - fne.margin
    axes.axvline(cut, color=GREY, ls="--", label="margin cut")
    axes.set(xlabel="cosine similarity", ylabel="density", ylim=(0, None))
    probability = axes.twinx()
    probability.spines["right"].set_visible(True)
    posterior = false_negative_posterior(similarity, stats, fne.prior, monotone=fne.monotone)
    percent = 100 * np.asarray(posterior)
    probability.plot(similarity, percent, color=GREEN, lw=2, label="posterior (right)")
    # Up to what there is: with a prior of 1e-4 it may stay below a percent throughout.
    top = min(1.1 * float(percent.max()), 102)
    probability.set(ylabel="probability of a false negative, %", ylim=(0, top))
    handles = [*axes.get_legend_handles_labels()[0], *probability.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _weights(stats, fne):
    figure, axes = _new_figure()
    similarity = _similarity_range(stats)
    mean, deviation = float(stats.positive.mean), float(stats.positive.variance) ** 0.5
    shifts = ((-1, "a deviation below the mean"), (0, "at the mean"), (1, "a deviation above it"))
    for (colour, width, dashes), (shift, label) in zip(_LINES, shifts, strict=True):
        positive = mean + shift * deviation
        weight = sampling_weights(
            jnp.asarray(similarity, jnp.float32),
            jnp.full(similarity.shape, positive, jnp.float32),
            jnp.zeros(similarity.shape, bool),
            stats,
            **weighing_settings(fne),
        )
        look = {"color": colour, "lw": width, "ls": dashes}
        axes.plot(similarity, weight, label=f"{label} ({positive:.2f})", **look)
    axes.set(xlabel="cosine similarity of the candidate", ylabel="sampling weight", ylim=(0, 1.05))
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        title="similarity of the anchor to its own match",
        title_fontsize=9,
    )
    return figure

"""A study in one figure."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fne_jax.evaluation.metric_names import describe
from fne_jax.report.figures import BLUE, GREEN, GREY, ORANGE, style
from fne_jax.studies.summary import Results, estimate, is_known

_ACROSS = 3  # panels in a row
_LEAST = 30  # candidates that a point of the calibration stands for
# Title of a panel, and the colours of its metrics.
_PANELS = {
    "R@1 by the complete truth, %": {
        "complete_t2i_r1": ORANGE,
        "complete_i2t_r1": BLUE,
        "complete_i2t_r1_controlled": GREEN,
    },
    "R@1 by the labels, %": {"i2t_r1": BLUE, "t2i_r1": ORANGE},
    "Negatives that are in truth matches, %": {
        "sampled_false_negative_rate": BLUE,
        "hardest_false_negative_rate": GREY,
    },
    "The posterior as a detector": {"roc_auc": BLUE, "average_precision": GREEN},
}


@style()
def study_figure(results: Results) -> bytes:
    """Returns a PNG: a dot per seed, a line at their mean, and the posterior's calibration."""
    known = {
        title: {name: colour for name, colour in metrics.items() if is_known(results, name)}
        for title, metrics in _PANELS.items()
    }
    known = {title: shown for title, shown in known.items() if shown}
    calibrated = any("calibration" in run for of in results.values() for run in of.values())
    count = len(known) + calibrated
    rows, columns = -(-count // _ACROSS), min(count, _ACROSS)
    height = rows * max(1.2 + 0.26 * len(results), 3.0)
    figure = Figure(figsize=(4.4 * columns, height), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, (panel, title) in enumerate(zip(axes, known, strict=False)):
        _plot_dots(panel, results, known[title], labelled=place % _ACROSS == 0)
        panel.set_title(title, fontsize=10)
    if calibrated:
        _plot_calibration(axes[count - 1], results)
    for unused in axes[count:]:
        unused.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _plot_dots(axes, results, colours, labelled):
    rows = np.arange(len(results))[::-1]
    for name, colour in colours.items():
        metric = describe(name)
        label = metric.legend
        for row, (cell, of) in zip(rows, results.items(), strict=True):
            values = [run[name] * metric.scale for run in of.values() if run.get(name) is not None]
            axes.plot(values, [row] * len(values), "o", color=colour, ms=4, alpha=0.6, label=label)
            label = "_again"  # named once
            found = estimate(results, cell, name)
            if found is not None:
                mean = found.mean * metric.scale
                axes.plot([mean] * 2, [row - 0.3, row + 0.3], color=colour, lw=2)
    axes.set_yticks(rows, [cell.name for cell in results] if labelled else [])
    axes.grid(axis="x", color=GREY, alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _plot_calibration(axes, results):
    axes.plot([0, 1], [0, 1], color=GREY, ls=":", label="calibrated")
    colours = matplotlib.colormaps["tab10"].colors
    for number, (cell, of) in enumerate(results.items()):
        label = cell.name
        for run in of.values():
            if "calibration" in run:
                tenths = [tenth for tenth in run["calibration"] if tenth[2] >= _LEAST]
                posterior, share, _ = zip(*tenths, strict=True) if tenths else ((), (), ())
                colour = colours[number % len(colours)]
                axes.plot(posterior, share, color=colour, lw=1, marker=".", ms=4, label=label)
                label = "_again"
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set(xlabel="posterior", ylabel="share that is true", xlim=(0, 1), ylim=(0, 1))
    axes.set_title("Calibration of the posterior", fontsize=10)

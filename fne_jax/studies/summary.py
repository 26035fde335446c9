"""A study's results over its seeds: means, spreads, differences to a baseline, and tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from fne_jax.evaluation.metric_names import CONTROLLED, WEIGHT, describe
from fne_jax.studies.cells import Cell

LEVEL = 95  # percent, of the intervals of differences
_TRUE = ("complete_t2i_r1", "complete_t2i_map_at_r", "complete_i2t_r1", "complete_i2t_map_at_r")
_CONTROLLED = tuple(f"{name}{CONTROLLED}" for name in _TRUE[2:])
_WEIGHTS = tuple(f"{name}{WEIGHT}" for name in _TRUE[2:])
_LABELLED = ("rsum", "i2t_r1", "t2i_r1")
_OF_POSTERIOR = ("roc_auc", "average_precision")
# What the metrics that the tables show are, the headline first: text to image by the truth, which
# how much captions say does not blur.
_MEANINGS = {
    _TRUE: "by the complete truth",
    _CONTROLLED: "by the complete truth, each caption's similarities less a weight times its "
    "number of words, so that ranking short captions high or low counts for less",
    _WEIGHTS: "these weights, each the best on the validation split",
    _LABELLED: "by the labels",
    (
        "sampled_false_negative_rate",
    ): "share of true matches among the negatives that the loss chose after the warm-up",
    _OF_POSTERIOR: "of the posterior as a detector of false negatives in the queue (area under the "
    "ROC curve, average precision)",
    ("density",): "share of true matches among these candidates",
    ("mean_posterior",): "mean of the posterior over them",
}
COLUMNS = tuple(name for names in _MEANINGS for name in names)
_COMPARED = (*_TRUE, *_CONTROLLED, "rsum", "sampled_false_negative_rate")

# The result of each seed, of each cell.
Results = Mapping[Cell, Mapping[int, Mapping[str, Any]]]


class Estimate(NamedTuple):
    """A metric over the seeds.

    Attributes:
      mean: The mean over the seeds.
      deviation: The standard deviation of a seed (n - 1), NaN for a single one.
      half_width: Half of the mean's 95 % t-interval, NaN for a single seed.
      count: The number of seeds.
    """

    mean: float
    deviation: float
    half_width: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Returns the estimate from one value a seed, at least one."""
        count = len(values)
        if count == 1:
            return cls(float(values[0]), math.nan, math.nan, 1)
        deviation = float(np.std(values, ddof=1))
        quantile = scipy.stats.t.ppf(0.5 + LEVEL / 200, count - 1)
        half_width = float(quantile * deviation / math.sqrt(count))
        return cls(float(np.mean(values)), deviation, half_width, count)

    @property
    def tells(self) -> bool:
        """Whether zero lies outside of the interval."""
        return abs(self.mean) > self.half_width


def estimate(results: Results, cell: Cell, metric: str) -> Estimate | None:
    """Returns a cell's metric over its seeds, or None where no run knows it."""
    values = [of.get(metric) for of in results.get(cell, {}).values()]
    known = [value for value in values if value is not None]
    return Estimate.of(known) if known else None


def difference(results: Results, cell: Cell, other: Cell, metric: str) -> Estimate | None:
    """Returns how much higher a cell's metric is than another's, paired by seed, or None."""
    ours, theirs = results.get(cell, {}), results.get(other, {})
    pairs = [(ours[seed].get(metric), theirs[seed].get(metric)) for seed in ours.keys() & theirs]
    known = [a - b for a, b in pairs if a is not None and b is not None]
    return Estimate.of(known) if known else None


def is_known(results: Results, metric: str) -> bool:
    """Returns whether any run of the study knows a metric."""
    return any(estimate(results, cell, metric) is not None for cell in results)


def over_seeds(seeds: int) -> str:
    """Returns what the numbers of a table are over so many seeds."""
    return "1 seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"


def markdown(results: Results, baseline: str) -> str:
    """Returns two tables: the metrics, and their differences to the baseline's.

    Each row says which seeds it is over; those of a difference are the ones that both have.
    """
    shown = [name for name in COLUMNS if is_known(results, name)]
    lines = [
        "Test metrics of the last weights, mean ± standard deviation over the seeds of a row.",
        "",
    ]
    for names, meaning in _MEANINGS.items():
        if columns := ", ".join(describe(name).heading for name in names if name in shown):
            lines.append(f"- {columns}: {meaning}")
    rows = []
    for cell, of in results.items():
        values = [(name, estimate(results, cell, name)) for name in shown]
        rows.append([cell.name, _named(of), *(_shown(*one, "deviation") for one in values)])
    lines += ["", *_table(shown, rows)]
    compared, rows, found = [name for name in shown if name in _COMPARED], [], []
    for cell, of in results.items():
        other = cell.baseline(baseline, results)
        common = of.keys() & results.get(other, {})
        if other != cell and common:
            values = [(name, difference(results, cell, other, name)) for name in compared]
            cells = [_shown(*one, "half_width", sign="+") for one in values]
            rows.append([f"{cell.name} less {other.name}", _named(common), *cells])
            found += [one for _, one in values if one is not None and one.count > 1]
    if rows:
        intervals = f"with {LEVEL} % t-intervals" if found else "single seeds: no intervals"
        lines += ["", f"Differences, paired by the seeds that both have, {intervals}."]
        if found:
            excluding = sum(one.tells for one in found)
            lines.append(
                f"* marks the {excluding} of {len(found)} that exclude 0; if nothing differed, "
                f"{100 - LEVEL} % would."
            )
        lines += ["", *_table(compared, rows)]
    return "\n".join(lines) + "\n"


def _named(seeds):
    """Returns seeds in words: `0 to 4`, or `0, 2`."""
    seeds = sorted(seeds)
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def runs_csv(results: Results) -> str:
    """Returns a line for each run: objective, variant, seed and every metric that is a number."""
    runs = [result for of in results.values() for result in of.values()]
    numbers = [name for run in runs for name in run if isinstance(run[name], (int, float))]
    names = sorted(set(numbers))
    rows = [
        [cell.objective, cell.variant, seed, *(result.get(name) for name in names)]
        for cell, of in results.items()
        for seed, result in sorted(of.items())
    ]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([["objective", "variant", "seed", *names], *rows])
    return stream.getvalue()


def _shown(name, value, spread, sign=""):
    if value is None:
        return "-"
    metric = describe(name)
    mean = metric.text(value.mean, sign=sign)
    if value.count == 1:
        return mean
    mark = " *" if sign and value.tells else ""
    return f"{mean} ± {metric.text(getattr(value, spread))}{mark}"


def _table(metrics, rows):
    header = ["", "seeds", *(describe(name).heading for name in metrics)]
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" + "--:|" * (len(header) - 1)
    yield from ("| " + " | ".join(row) + " |" for row in rows)

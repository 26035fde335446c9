"""A study's results over its seeds: means, spreads, differences to a baseline, and tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from fne_jax.evaluation.metric_names import COMPLETE, CONTROLLED, WEIGHT, describe
from fne_jax.studies.cells import Cell

# Of the intervals of differences, in percent.
LEVEL = 95

# Metrics that the tables show, as far as any run knows them, the headline first: text to image by
# the truth, which how much captions say does not blur.
COLUMNS = (
    *("complete_t2i_r1", "complete_t2i_map_at_r"),
    *("complete_i2t_r1", "complete_i2t_map_at_r"),
    *("complete_i2t_r1_controlled", "complete_i2t_map_at_r_controlled"),
    *("complete_i2t_r1_weight", "complete_i2t_map_at_r_weight"),
    *("rsum", "i2t_r1", "t2i_r1"),
    *("sampled_false_negative_rate", "roc_auc", "average_precision", "density", "mean_posterior"),
)
# Of these the table of differences tells.
_COMPARED = (
    *("complete_t2i_r1", "complete_t2i_map_at_r", "complete_i2t_r1", "complete_i2t_map_at_r"),
    *("complete_i2t_r1_controlled", "complete_i2t_map_at_r_controlled"),
    *("rsum", "sampled_false_negative_rate"),
)

# The result of each seed, of each cell.
Results = Mapping[Cell, Mapping[int, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Estimate:
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
    pairs = [
        (ours[seed].get(metric), theirs[seed].get(metric)) for seed in sorted(ours.keys() & theirs)
    ]
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
    lines = ["Test metrics of the last weights, mean ± standard deviation over the seeds of a row."]
    lines += [*_explanations(shown), ""]
    lines += _table(
        ["", "seeds", *(describe(name).heading for name in shown)],
        [
            [
                cell.name,
                _named(of),
                *(_shown(name, estimate(results, cell, name)) for name in shown),
            ]
            for cell, of in results.items()
        ],
    )
    compared = [name for name in shown if name in _COMPARED]
    rows, found = [], []
    for cell, of in results.items():
        other = cell.baseline(baseline)
        common = of.keys() & results.get(other, {})
        if other == cell or not common:
            continue
        row = [difference(results, cell, other, name) for name in compared]
        values = [_shown_difference(name, one) for name, one in zip(compared, row, strict=True)]
        rows.append([f"{cell.name} less {other.name}", _named(common), *values])
        found += [one for one in row if one is not None and one.count > 1]
    if rows:
        intervals = f"with {LEVEL} % t-intervals" if found else "single seeds: no intervals"
        lines += ["", f"Differences, paired by the seeds that both have, {intervals}."]
        if found:
            excluding = sum(one.tells for one in found)
            lines.append(
                f"* marks the {excluding} of {len(found)} that exclude 0; if nothing differed, "
                f"{100 - LEVEL} % would."
            )
        lines += ["", *_table(["", "seeds", *(describe(name).heading for name in compared)], rows)]
    return "\n".join(lines) + "\n"


def _named(seeds):
    """Returns seeds in words: `0 to 4`, or `0, 2`."""
    seeds = sorted(seeds)
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _explanations(shown: Sequence[str]) -> list[str]:
    """Returns a line for each kind of column that is shown."""
    headings = {name: describe(name).heading for name in shown}

    def some(*names: str) -> str:
        return ", ".join(headings[name] for name in names if name in headings)

    controlled = [name for name in shown if name.endswith(CONTROLLED)]
    weights = [name for name in shown if name.endswith(WEIGHT)]
    true = [
        name for name in shown if name.startswith(COMPLETE) and name not in controlled + weights
    ]
    meanings = {
        some(*true): "by the complete truth",
        some(*controlled): "by the complete truth, each caption's similarities less a weight "
        "times its number of words, so that ranking short captions high or low counts for less",
        some(*weights): "these weights, each the best on the validation split",
        some("rsum", "i2t_r1", "t2i_r1"): "by the labels",
        some("sampled_false_negative_rate"): "share of the negatives that the loss chose after "
        "the warm-up that are in truth matches",
        some("roc_auc", "average_precision"): "of the posterior as a detector of false negatives "
        "in the queue (area under the ROC curve, average precision)",
        some("density"): "share of true matches among these candidates",
        some("mean_posterior"): "mean of the posterior over them",
    }
    return ["", *(f"- {columns}: {meaning}" for columns, meaning in meanings.items() if columns)]


def runs_csv(results: Results) -> str:
    """Returns a line for each run: objective, variant, seed and every metric that is a number."""
    names = sorted(
        {
            name
            for of in results.values()
            for result in of.values()
            for name, value in result.items()
            if isinstance(value, (int, float))
        }
    )
    rows = [
        [cell.objective, cell.variant, seed, *(result.get(name) for name in names)]
        for cell, of in results.items()
        for seed, result in sorted(of.items())
    ]
    return _csv(["objective", "variant", "seed", *names], rows)


def summary_csv(results: Results, baseline: str) -> str:
    """Returns a line for each cell and metric: its estimate, and its difference to the baseline.

    The difference is over the seeds that both have, `common_seeds` in number.
    """
    rows = []
    for cell in results:
        for name in COLUMNS:
            value = estimate(results, cell, name)
            if value is None:
                continue
            row = [cell.objective, cell.variant, name, value.mean, value.deviation, value.count]
            other = cell.baseline(baseline)
            gap = None if other == cell else difference(results, cell, other, name)
            rows.append(
                row + ([None] * 3 if gap is None else [gap.mean, gap.half_width, gap.count])
            )
    header = ["objective", "variant", "metric", "mean", "deviation", "seeds"]
    return _csv([*header, "difference", "half_width", "common_seeds"], rows)


def _shown(name, value):
    if value is None:
        return "-"
    metric = describe(name)
    mean = metric.text(value.mean)
    return mean if value.count == 1 else f"{mean} ± {metric.text(value.deviation)}"


def _shown_difference(name, value):
    if value is None:
        return "-"
    metric = describe(name)
    mean = metric.text(value.mean, sign="+")
    if value.count == 1:
        return mean
    return f"{mean} ± {metric.text(value.half_width)}{' *' if value.tells else ''}"


def _table(header, rows):
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" + "--:|" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _csv(header, rows):
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if _missing(value) else value for value in row] for row in rows])
    return stream.getvalue()


def _missing(value):
    return value is None or (isinstance(value, float) and math.isnan(value))

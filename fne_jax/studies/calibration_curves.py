"""Made for a table of the docs: what so many verdicts tell of a run's unlabelled pairs.

The truth is the reviewer. `study --verdicts` writes the table that docs/verdicts.md shows; nothing
that trains or evaluates uses this module.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fne_jax.errors import UserError
from fne_jax.false_negatives import fitted_detector, verdict_samples
from fne_jax.false_negatives.detection_quality import RECALL, ranking_scores
from fne_jax.false_negatives.judged_split import JudgedSplit, embed
from fne_jax.false_negatives.likely_matches import LEAST_PROBABILITY
from fne_jax.false_negatives.pair_features import features
from fne_jax.false_negatives.verdict_samples import Density
from fne_jax.model.model import load_workdir
from fne_jax.studies.cells import Run
from fne_jax.studies.summary import Estimate, over_seeds

# Samples of verdicts of each run.
SAMPLES = 3
# Random unlabelled pairs, other than the samples', that a detector is measured on.
_PAIRS = 200_000
_PRECISION = f"precision_at_recall_{RECALL:g}"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What one sample of verdicts told.

    Attributes:
      density: The estimated share of unlabelled pairs that match.
      at_recall: Among random unlabelled pairs, the precision of a detector fitted to the verdicts
        at a recall of `RECALL`; NaN where they were too few to fit one.
      delivered: The share of matches among those random pairs that the detector would list, being
        asked for a precision of `LEAST_PROBABILITY`; NaN where it lists none.
    """

    density: Density
    at_recall: float
    delivered: float


@dataclasses.dataclass(frozen=True)
class OfRun:
    """What verdicts on a run's training split told, and what is so.

    Attributes:
      density: The share of random unlabelled pairs that match.
      by_similarity: The precision at a recall of `RECALL` of similarity alone, to which nothing is
        fitted.
      told: By number of verdicts, what each of `SAMPLES` samples told.
    """

    density: float
    by_similarity: float
    told: Mapping[int, Sequence[Calibration]]


def of_runs(runs: Sequence[Run], budgets: Sequence[int]) -> list[OfRun]:
    """Returns what verdicts tell of the training split as the last weights of each run embed it.

    Args:
      runs: Finished runs, of a dataset whose matches are all known.
      budgets: Numbers of verdicts.
    """
    found = []
    for run in runs:
        model = load_workdir(run.workdir, "latest")
        train = model.load_split("train")
        found.append(of_split(embed(model, train), train.truth.is_true, budgets, run.seed))
    return found


def of_split(
    split: JudgedSplit,
    is_true: Callable[[np.ndarray, np.ndarray], np.ndarray],
    budgets: Sequence[int],
    seed: int,
) -> OfRun:
    """Returns what verdicts on samples of a split's unlabelled pairs tell.

    Args:
      split: The split.
      is_true: Takes [n] captions and [n] images and returns whether they match in truth.
      budgets: Numbers of verdicts; the first of a sample are a smaller one.
      seed: The seed of the samples and of the random pairs.
    """
    caption, image = _random_pairs(split, np.random.default_rng(seed))
    truth = is_true(caption, image)
    similarity = split.similarity(caption, image)
    table = features(split, caption, image)
    told: dict[int, list[Calibration]] = {budget: [] for budget in budgets}
    for number in range(SAMPLES):
        drawn = verdict_samples.sample(split, max(budgets), seed * SAMPLES + number)
        judged = features(split, drawn.caption, drawn.image)
        is_match = is_true(drawn.caption, drawn.image)
        for budget in budgets:
            first = judged[:budget], is_match[:budget], drawn.weight[:budget]
            told[budget].append(
                Calibration(
                    verdict_samples.density(*first[1:]), *_fitted(*first, seed, table, truth)
                )
            )
    return OfRun(float(truth.mean()), _number(ranking_scores(similarity, truth)[_PRECISION]), told)


def _random_pairs(split, rng):
    caption = rng.integers(len(split.text_emb), size=_PAIRS)
    image = rng.integers(len(split.image_emb), size=_PAIRS)
    other = np.asarray(split.caption_image)[caption] != image
    return caption[other], image[other]


def _fitted(judged, is_match, weight, seed, table, truth):
    """Returns a detector's `at_recall` and `delivered`."""
    try:
        found = fitted_detector.fit(judged, is_match, weight, seed)
    except UserError:
        return math.nan, math.nan
    probability = found.probability(table)
    at_recall = _number(ranking_scores(probability, truth)[_PRECISION])
    try:
        listed = probability >= found.threshold(LEAST_PROBABILITY)
    except UserError:
        return at_recall, math.nan
    return at_recall, float(truth[listed].mean()) if listed.any() else math.nan


def _number(value):
    return math.nan if value is None else value


def markdown(runs: Sequence[OfRun]) -> str:
    """Returns a table: by number of verdicts, the density and the detector that they give.

    Args:
      runs: At least one, of the same numbers of verdicts.
    """
    similarity = [100 * run.by_similarity for run in runs]
    lines = [
        f"What verdicts tell of a finished run: {over_seeds(len(runs))},",
        f"each the mean of {SAMPLES} samples; precision and recall among {_PAIRS:,} random pairs.",
        f"{_share([100 * run.density for run in runs])} of unlabelled pairs match.",
        "",
        f"| verdicts | density | its interval holds the truth | precision at recall {RECALL:g} | "
        f"precision where {100 * LEAST_PROBABILITY:.0f} % was asked for |",
        "|--:|--:|--:|--:|--:|",
        f"| none (similarity) | | | {_share(similarity)} | |",
    ]
    for budget in runs[0].told:
        told = [one for run in runs for one in run.told[budget]]
        within = sum(
            one.density.low <= run.density <= one.density.high
            for run in runs
            for one in run.told[budget]
        )
        delivered = [100 * one.delivered for one in told if not math.isnan(one.delivered)]
        lines.append(
            f"| {budget:,} | {_by_seed(runs, budget, lambda one: one.density.value)} | "
            f"{within} of {len(told)} | {_by_seed(runs, budget, lambda one: one.at_recall)} | "
            + (f"{min(delivered):.0f} to {max(delivered):.0f} % |" if delivered else "- |")
        )
    return "\n".join(lines) + "\n"


def _by_seed(runs, budget, of):
    """Returns a share in percent over the seeds, each the mean of its samples that have it."""
    means = []
    for run in runs:
        known = [100 * of(one) for one in run.told[budget] if not math.isnan(of(one))]
        means += [np.mean(known)] if known else []
    return _share(means) if means else "-"


def _share(values):
    share = Estimate.of(values)
    spread = "" if share.count == 1 else f" ± {share.deviation:.1f}"
    return f"{share.mean:.1f}{spread} %"

"""Prints the tables of docs/verdicts.md: what numbers of verdicts would tell of a finished study.

python -m tests.support.verdict_tables WORKDIR --systems clip fne --verdicts 200 500

The truth is the reviewer. Systems are named by their folders, the first is what pairs are judged
by.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fne_jax.errors import UserError
from fne_jax.evaluation.metric_names import DIRECTIONS
from fne_jax.evaluation.top_k import top_k
from fne_jax.false_negatives import fitted_detector, verdict_samples
from fne_jax.false_negatives.detection_quality import RECALL, ranking_scores
from fne_jax.false_negatives.judged_split import JudgedSplit, embed
from fne_jax.false_negatives.likely_matches import LEAST_PROBABILITY
from fne_jax.false_negatives.pair_features import features
from fne_jax.false_negatives.verdict_samples import Density
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import load_workdir
from fne_jax.studies.execution import RESULT_NAME
from fne_jax.studies.summary import Estimate, over_seeds

_ORDERS = 200  # random orders of the queries
SAMPLES = 3  # of each run
_PAIRS = 200_000  # random unlabelled pairs that a detector is measured on
_PRECISION = f"precision_at_recall_{RECALL:g}"


def tables(workdir: pathlib.Path, systems: Sequence[str], budgets: Sequence[int]) -> Iterator[str]:
    """Yields how verdicts rank the systems of a study, and what they tell of the first's pairs.

    Args:
      workdir: The folder of the study.
      systems: Folders in it; they are ranked over the seeds that all have.
      budgets: Numbers of verdicts.
    """
    runs = {
        name: {int(path.parent.name[len("seed") :]): path.parent
               for path in sorted((workdir / name).glob(f"seed*/{RESULT_NAME}"))}
        for name in systems
    }  # fmt: skip
    embedded: dict[int, list[EmbeddedSplit]] = {}
    for seed in sorted(set.intersection(*map(set, runs.values()))):
        models = [load_workdir(of[seed], "latest") for of in runs.values()]
        embedded[seed] = [one.embed_split(one.load_evaluation_split("test")) for one in models]
    yield ranking_table(embedded, budgets)
    told = []
    for seed, folder in runs[systems[0]].items():
        model = load_workdir(folder, "latest")
        train = model.load_split("train")
        told.append(of_split(embed(model, train), train.truth.is_true, budgets, seed))
    yield calibration_table(told)


class FirstResults(NamedTuple):
    """What several systems find first for all queries of one direction.

    Attributes:
      pair: [systems, queries] int64, `caption * images + image` of the first result.
      is_true: [systems, queries] bool, whether it matches in truth.
      labelled: [systems, queries] bool, whether it is a labelled match, which needs no verdict.
    """

    pair: np.ndarray
    is_true: np.ndarray
    labelled: np.ndarray


def first_results(splits: Sequence[EmbeddedSplit]) -> dict[str, FirstResults]:
    """Returns the first results by direction of systems, given a split as each embeds it."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in DIRECTIONS}
    for split in splits:
        images, captions = np.arange(len(split.image_emb)), np.arange(len(split.text_emb))
        found["i2t"].append((top_k(split.image_emb, split.text_emb, 1)[0][:, 0], images))
        found["t2i"].append((captions, top_k(split.text_emb, split.image_emb, 1)[0][:, 0]))
    first, results = splits[0], {}
    for direction, pairs in found.items():
        caption, image = (np.stack(rows) for rows in zip(*pairs, strict=True))
        results[direction] = FirstResults(
            caption.astype(np.int64) * len(first.image_emb) + image,
            first.truth[image, caption],
            first.caption_image[caption] == image,
        )
    return results


def ranked_rightly(results: FirstResults, verdicts: int, seed: int) -> tuple[float, float]:
    """Returns the share of pairs of systems that so many verdicts rank as all verdicts would.

    Queries are drawn at random as long as their unlabelled first results, counting once what
    systems share, need no more verdicts. Ties count half; pairs that tie by all verdicts are left
    out.

    Returns:
      The mean share over random orders of the queries, and the mean number of queries; NaN where
      all pairs tie, or the verdicts are too few for any query.
    """
    rng = np.random.default_rng(seed)
    systems, queries = results.pair.shape
    first, second = np.triu_indices(systems, 1)
    whole = results.is_true.mean(axis=1)
    right_sign = np.sign(whole[first] - whole[second])
    differs = right_sign != 0
    # A result counts once for each query: for the first of the systems that found it.
    shared = np.zeros((systems, queries), bool)
    for system in range(1, systems):
        shared[system] = (results.pair[:system] == results.pair[system]).any(axis=0)
    asked = (~shared & ~results.labelled).sum(axis=0)
    shares, counts = [], []
    for _ in range(_ORDERS):
        order = rng.permutation(queries)
        count = int(np.searchsorted(np.cumsum(asked[order]), verdicts, side="right"))
        if count and differs.any():
            hits = results.is_true[:, order[:count]].sum(axis=1)
            sign = np.sign(hits[first] - hits[second])
            shares.append(np.where(sign == 0, 0.5, sign == right_sign)[differs].mean())
            counts.append(count)
    return (float(np.mean(shares)), float(np.mean(counts))) if counts else (math.nan, math.nan)


def ranking_table(of_seeds: Mapping[int, Sequence[EmbeddedSplit]], budgets: Sequence[int]) -> str:
    """Returns a table by number of verdicts, of the test split as each system embeds it by seed."""
    results = {seed: first_results(splits) for seed, splits in of_seeds.items()}
    lines = [
        f"Pairs of {len(next(iter(of_seeds.values())))} systems that verdicts rank by true R@1 as "
        f"the whole truth does, each\nthe mean over {_ORDERS} draws of the queries: "
        f"{over_seeds(len(results))}.",
        "",
        "| verdicts | image to text | queries | text to image | queries |",
        "|--:|--:|--:|--:|--:|",
    ]
    for budget in budgets:
        line = f"| {budget:,} |"
        for direction in DIRECTIONS:
            found = [ranked_rightly(of[direction], budget, seed) for seed, of in results.items()]
            known = [one for one in found if not math.isnan(one[0])]
            queries = f"{np.mean([one[1] for one in known]):,.0f}" if known else "-"
            line += f" {_share([one[0] for one in known], 0)} | {queries} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


class Calibration(NamedTuple):
    """What one sample of verdicts told.

    Attributes:
      density: The estimated share of unlabelled pairs that match.
      at_recall: The precision at a recall of `RECALL`, among random unlabelled pairs, of a detector
        fitted to the verdicts; NaN where they were too few.
      delivered: The share of matches among those pairs that the detector would list, asked for a
        precision of `LEAST_PROBABILITY`; NaN where it lists none.
    """

    density: Density
    at_recall: float
    delivered: float


class OfRun(NamedTuple):
    """What verdicts on a run's training split told, and what is so.

    Attributes:
      density: The share of random unlabelled pairs that match.
      by_similarity: The precision at a recall of `RECALL` of similarity alone.
      told: By number of verdicts, what each of `SAMPLES` samples told.
    """

    density: float
    by_similarity: float
    told: Mapping[int, Sequence[Calibration]]


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
      budgets: Numbers of verdicts, the first of a sample.
      seed: Of the samples and of the random pairs.
    """
    rng = np.random.default_rng(seed)
    caption = rng.integers(len(split.text_emb), size=_PAIRS)
    image = rng.integers(len(split.image_emb), size=_PAIRS)
    other = np.asarray(split.caption_image)[caption] != image
    caption, image = caption[other], image[other]
    truth, table = is_true(caption, image), features(split, caption, image)
    told: dict[int, list[Calibration]] = {budget: [] for budget in budgets}
    for number in range(SAMPLES):
        drawn = verdict_samples.sample(split, max(budgets), seed * SAMPLES + number)
        judged = features(split, drawn.caption, drawn.image)
        is_match = is_true(drawn.caption, drawn.image)
        for budget in budgets:
            weight = drawn.weight[:budget] * len(is_match) / budget
            first = judged[:budget], is_match[:budget], weight
            density = verdict_samples.density(*first[1:])
            told[budget].append(Calibration(density, *_fitted(*first, seed, table, truth)))
    by_similarity = _precision(split.similarity(caption, image), truth)
    return OfRun(float(truth.mean()), by_similarity, told)


def _precision(score, truth):
    value = ranking_scores(score, truth)[_PRECISION]
    return math.nan if value is None else value


def _fitted(judged, is_match, weight, seed, table, truth):
    """Returns a detector's `at_recall` and `delivered`."""
    at_recall = math.nan
    try:
        found = fitted_detector.fit(judged, is_match, weight, seed)
        probability = found.probability(table)
        at_recall = _precision(probability, truth)
        listed = probability >= found.threshold(LEAST_PROBABILITY)
    except UserError:  # too few to fit it, or no threshold
        return at_recall, math.nan
    return at_recall, float(truth[listed].mean()) if listed.any() else math.nan


def calibration_table(runs: Sequence[OfRun]) -> str:
    """Returns a table by number of verdicts, over at least one run."""
    lines = [
        f"What verdicts tell of a finished run: {over_seeds(len(runs))},",
        f"each the mean of {SAMPLES} samples; precision and recall among {_PAIRS:,} random pairs.",
        f"{_share([run.density for run in runs])} of unlabelled pairs match.",
        "",
        f"| verdicts | density | its interval covers the truth | precision at recall {RECALL:g} | "
        f"precision where {100 * LEAST_PROBABILITY:.0f} % was asked for |",
        "|--:|--:|--:|--:|--:|",
        f"| none (similarity) | | | {_share([run.by_similarity for run in runs])} | |",
    ]
    for budget in runs[0].told:
        told = [(run.density, one) for run in runs for one in run.told[budget]]
        covers = sum(one.density.low <= truth <= one.density.high for truth, one in told)
        listed = [100 * one.delivered for _, one in told if not math.isnan(one.delivered)]
        density, at_recall = (
            _share([mean for run in runs if (mean := _mean(map(of, run.told[budget]))) is not None])
            for of in (lambda one: one.density.value, lambda one: one.at_recall)
        )
        lines.append(
            f"| {budget:,} | {density} | {covers} of {len(told)} | {at_recall} | "
            + (f"{min(listed):.0f} to {max(listed):.0f} % |" if listed else "- |")
        )
    return "\n".join(lines) + "\n"


def _mean(values):
    """Returns the mean of the values that are known, or None."""
    known = [value for value in values if not math.isnan(value)]
    return np.mean(known) if known else None


def _share(values, digits=1):
    """Returns shares over the seeds in percent, or a dash for none."""
    if not values:
        return "-"
    share = Estimate.of([100 * value for value in values])
    spread = "" if share.count == 1 else f" ± {share.deviation:.{digits}f}"
    return f"{share.mean:.{digits}f}{spread} %"


def main() -> None:
    """Parses the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--systems", nargs="+", required=True)
    parser.add_argument("--verdicts", nargs="+", type=int, required=True)
    options = parser.parse_args()
    for table in tables(options.workdir, options.systems, options.verdicts):
        print(table)


if __name__ == "__main__":
    main()

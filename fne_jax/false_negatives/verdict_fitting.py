"""What is learnt from verdicts on a split: a fitted detector, and how many pairs match at all."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.data.verdicts import MATCH, Verdict, agreed, pairs_of, weights_of
from fne_jax.errors import UserError
from fne_jax.false_negatives import fitted_detector
from fne_jax.false_negatives.detectors import judge_by
from fne_jax.false_negatives.fitted_detector import FittedDetector
from fne_jax.false_negatives.judged_split import JudgedSplit
from fne_jax.false_negatives.pair_features import features
from fne_jax.false_negatives.suspects import Suspects
from fne_jax.false_negatives.verdict_samples import Density, density, pooled

# Of which the threshold is told.
_PRECISIONS = (0.5, 0.8, 0.9)
# First pairs of an audit whose precision is told, and the verdicts among them that this takes.
_RANKS, _LEAST_VERDICTS = (100, 1000, 10_000), 10
# Where classes of probability begin whose share of matches is told; each ends where the next does.
_CLASSES = (0.0, 0.2, 0.5, 0.8)


def said_of(judged: JudgedSplit, verdicts: Sequence[Verdict], labelled: bool = False) -> Pairs:
    """Returns what most reviewers say of pairs, with `is_match`, `weight` and `sample`.

    A pair that random samples drew stands for others in each of them, whoever judged it there, and
    is there once for each. Weights are scaled so that the verdicts of each sample stand for all
    unlabelled pairs, however many of it were given.

    Of `verdicts` there is each reviewer's last on each of its pairs in each sample. Those on
    labelled pairs, which no sample draws, are told only if `labelled`, and then alone. Raises
    UserError if a verdict is of another dataset, or the weights of a sample stand for far more
    pairs than there are.
    """
    drawn, kept = weights_of(verdicts), agreed(verdicts)
    pairs = pairs_of(kept, judged.dataset)
    rows = [
        (row, name, weight)
        for row, one in enumerate(kept)
        if (judged.caption_image[pairs.caption[row]] == pairs.image[row]) == labelled
        for name, weight in drawn.get(one.pair, {"": np.nan}).items()
    ]
    row = np.array([row for row, _, _ in rows], int)
    weight = np.array([weight for *_, weight in rows], float)
    name = np.array([name for _, name, _ in rows], str)
    names, sample = np.unique(name, return_inverse=True)
    total = np.bincount(sample, np.nan_to_num(weight))
    for one in np.flatnonzero(total > 2 * judged.unlabelled):
        raise UserError(
            f"the weights of the sample {str(names[one])!r} stand for {total[one]:,.0f} pairs, of "
            f"{judged.unlabelled:,} unlabelled ones: a spreadsheet may have lost their decimal "
            "points; export the verdicts again"
        )
    weight *= judged.unlabelled / np.where(total > 0, total, 1)[sample]
    return pairs[row].replace(
        is_match=np.array([one.verdict == MATCH for one in kept], bool)[row],
        weight=weight,
        sample=name,
    )


def fit_and_write(judged: JudgedSplit, said: Pairs, path: pathlib.Path) -> JudgedSplit:
    """Fits a detector to verdicts, tells how good it is, and returns the split with it.

    Raises UserError if the verdicts are too few, or the detector cannot be written.
    """
    detector = fit_detector(judged, said)
    fitted_detector.write(path, detector)
    print(describe(detector))
    print(f"written to {path}")
    return dataclasses.replace(judged, fitted=detector)


def fit_detector(judged: JudgedSplit, said: Pairs, seed: int = 0) -> FittedDetector:
    """Returns a detector fitted to verdicts.

    Raises UserError if the verdicts are too few.
    """
    about = {"run": judged.name, "step": judged.step, "split": judged.split_name}
    about["samples"] = sorted(set(said.sample.tolist()) - {""})
    found = _density(said)
    if found is not None:
        about["density"] = dataclasses.asdict(found)
    # Each pair once, even if several samples drew it.
    _, first, pair = np.unique(
        np.stack([said.caption, said.image]), axis=1, return_index=True, return_inverse=True
    )
    drawn = np.isfinite(said.weight)
    weight = pooled(said.weight[drawn], said.sample[drawn])
    weight = np.bincount(pair.ravel()[drawn], weight, minlength=len(first))
    said = said[first].replace(weight=np.where(weight > 0, weight, np.nan))
    table = features(judged, said.caption, said.image)
    return fitted_detector.fit(table, said.is_match, said.weight, seed, about)


def _density(said, among=None):
    """Returns the share of matches among unlabelled pairs, or a mask's; None of no verdict."""
    drawn = np.isfinite(said.weight)
    if among is not None:
        drawn &= among
    found = said[drawn]
    return density(found.is_match, found.weight, found.sample) if len(found) else None


def describe_density(said: Pairs, by_judges: Pairs) -> str:
    """Returns how many pairs match at all, by the verdicts on random samples, as lines."""
    share, lines = _density(by_judges), [_density_text(said)]
    if share is not None:
        found = corrected_density(share, said, by_judges)
        line = f"by {share.verdicts:,} verdicts of judges {share.value:.2%} match"
        if found is None:
            line += "; judge some of their sample yourself to learn by how much they err"
        else:
            line += (
                f"; corrected by what people say of the same pairs {found.value:.2%} match "
                f"({found.low:.2%} to {found.high:.2%}, 95 % interval)"
            )
        lines.append(line)
    return "\n".join(lines)


def corrected_density(share: Density, said: Pairs, by_judges: Pairs) -> Density | None:
    """Returns the share of matches by judges, corrected by what people say of some of these pairs.

    Added is the share of pairs that people alone call matches, and taken off that of pairs that
    judges alone do (Angelopoulos et al. 2023, "Prediction-powered inference"). The intervals of the
    three are joined by MOVER (Zou and Donner 2008).

    Returns:
      The share; None where people have judged no such pair in a random sample.
    """
    judges = dict(zip(by_judges.rows(), by_judges.is_match.tolist(), strict=True))
    common = np.array([pair in judges for pair in said.rows()], bool)
    both = said[common & np.isfinite(said.weight)]
    if not len(both):
        return None
    called = np.array([judges[pair] for pair in both.rows()])
    missed, made_up = (
        density(wrong, both.weight, both.sample)
        for wrong in (both.is_match & ~called, ~both.is_match & called)
    )
    value = share.value + missed.value - made_up.value
    below = share.value - share.low, missed.value - missed.low, made_up.high - made_up.value
    above = share.high - share.value, missed.high - missed.value, made_up.value - made_up.low
    low, high = value - np.linalg.norm(below), value + np.linalg.norm(above)
    return Density(*np.clip([value, low, high], 0, 1).tolist(), share.verdicts)


def _density_text(said):
    found = _density(said)
    if found is None:
        return (
            "no person's verdict is of a random sample, so how many pairs match is not known; "
            "`review --sample` asks of one"
        )
    if found.low == found.value or found.high == found.value:  # so many agree
        return (
            f"{found.value:.0%} of all unlabelled pairs match by all {found.verdicts:,} verdicts "
            f"({found.low:.2%} to {found.high:.2%}, 95 % interval): too few to tell "
            "config.fne.prior; judge more of `review --sample`"
        )
    return (
        f"{found.value:.2%} of all unlabelled pairs match ({found.low:.2%} to {found.high:.2%}, "
        f"95 % interval, {found.verdicts:,} verdicts): what config.fne.prior should be"
    )


def describe_quality(
    judged: JudgedSplit, said: Pairs, suspects: Suspects, fitted_to_them: bool
) -> str:
    """Returns how good an audit's detector is, by the verdicts on random samples.

    These are the share of matches among the audit's first pairs, before any is left out for a
    verdict, and among all pairs by classes of probability, from which
    `config.data.matches_positive` and `matches_negative` may be chosen.

    Returns:
      A line for each number of first pairs and each class with enough verdicts; "" for none.
    """
    said = said[np.isfinite(said.weight)]
    rank = {pair: number for number, pair in enumerate(suspects.pairs.rows())}
    ranks = np.array([rank.get(pair, len(rank)) for pair in said.rows()], int)
    lines = []
    for first in (*(number for number in _RANKS if number < len(rank)), len(rank)):
        if (among := ranks < first).sum() >= _LEAST_VERDICTS:
            lines.append(f"of the first {first:,} pairs {_matching(said, among)}")
    if len(said):
        lines += _calibration(judged, said, suspects.detector)
    if lines and fitted_to_them:
        lines.append(
            "the detector was fitted to these verdicts, so it does a little worse on other pairs"
        )
    return "\n".join(lines)


def _calibration(judged, said, detector):
    similarity = judged.similarity(said.caption, said.image)
    probability = judge_by(detector, judged)(said.replace(similarity=similarity)).probability
    weight = pooled(said.weight, said.sample)
    for low, high in itertools.pairwise((*_CLASSES, np.inf)):
        among = (low <= probability) & (probability < high)
        if among.sum() >= _LEAST_VERDICTS:
            expected = np.average(probability[among], weights=weight[among])
            end = f"to {high:g}" if high <= 1 else "or more"
            yield (
                f"of the pairs of probability {low:g} {end}, {_percent(expected)} on average, "
                f"{_matching(said, among)}"
            )


def _matching(said, among):
    found = _density(said, among)
    return (
        f"{_percent(found.value)} match ({_percent(found.low)} to {_percent(found.high)}, 95 % "
        f"interval, {found.verdicts:,} verdicts)"
    )


def _percent(share):
    return f"{share:.2%}" if share < 0.01 else f"{share:.0%}"


def describe(detector: FittedDetector) -> str:
    """Returns what a detector was fitted to and how good it is, as lines for a terminal."""
    about = detector.about
    step = "" if about.get("step") is None else f", step {about['step']}"
    lines = [
        f"fitted to {about['verdicts']:,} verdicts on {about['split']}, {about['matches']:,} of "
        f"them matches, by the embeddings of {about['run']}{step}",
    ]
    for precision in _PRECISIONS:
        try:
            least = detector.threshold(precision)
        except UserError:
            lines.append(f"precision {precision:.0%}: not reached by these verdicts")
            continue
        recall = detector.recall[np.searchsorted(-detector.least, -least, side="right") - 1]
        lines.append(
            f"precision {precision:.0%} from probability {least:.3f} on, with {recall:.0%} of the "
            "matches, by verdicts held out"
        )
    return "\n".join(lines)

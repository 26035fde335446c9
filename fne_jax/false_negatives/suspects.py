"""Likely false negatives of a split: unlabelled pairs that a detector suspects."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.data.pairs import PairDataset
from fne_jax.false_negatives import detection_quality, detectors
from fne_jax.false_negatives.judged_split import JudgedSplit
from fne_jax.false_negatives.likely_matches import LEAST_PROBABILITY, write_likely_matches
from fne_jax.false_negatives.unlabelled import unlabelled_pairs

# Stands for a detector where labelled pairs are suspected not to match.
LABELS = "labels"
# Pairs that the precision is measured over, and random ones that it is compared with.
_PRECISION_AT, _RANDOM_PAIRS = 100, 100_000


@dataclasses.dataclass(frozen=True)
class Suspects:
    """Unlabelled pairs of a high probability, or labels that may be wrong, and how they were found.

    Attributes:
      pairs: The pairs as the detector judges them, the most suspect first.
      detector: A key of `DETECTORS`, or `LABELS`.
      least: The least probability that was asked for.
      per_query: How many pairs of each caption and of each image were looked at.
      refuted: How many pairs were left out since people say that they are no such find.
    """

    pairs: Pairs
    detector: str
    least: float = 0.0
    per_query: int = 0
    refuted: int = 0

    @property
    def of_labels(self) -> bool:
        """Whether the pairs are labelled, and suspected not to match."""
        return self.detector == LABELS

    @property
    def confirmed(self) -> np.ndarray:
        """[pairs] bool, which of them people say to be what they are suspected of."""
        if self.pairs.is_match is None:
            return np.zeros(len(self.pairs), bool)
        return self.pairs.is_match != self.of_labels


def find_suspects(
    judged: JudgedSplit,
    *,
    per_query: int,
    detector: str | None = None,
    least: float | None = None,
) -> Suspects:
    """Returns the pairs that a detector gives a probability of `least` or more.

    The pairs that it judges are the most similar ones of each caption and of each image.

    It looks at `per_query` pairs of each caption and image. The detector is a key of `DETECTORS`,
    by default the best that is there; `least` is by default `config.fne.posterior_threshold`.
    Raises UserError if the detector needs what is missing, such as enough statistics.
    """
    detector = detectors.best_available(judged) if detector is None else detector
    judge = detectors.judge_by(detector, judged)
    pairs = judge(unlabelled_pairs(judged, per_query))
    least = judged.config.fne.posterior_threshold if least is None else least
    # What the detector does not tell apart stays in the order of similarity.
    order = _order(pairs)
    order = order[pairs.probability[order] >= least]
    return Suspects(pairs[order], detector, least, per_query)


def write_matches(
    judged: JudgedSplit,
    detector: str | None,
    path: pathlib.Path,
    per_query: int,
    least: float | None = None,
    said: Pairs | None = None,
) -> str:
    """Writes the likely matches of a split for `config.data.matches`, and returns what they are.

    It looks at `per_query` images of each caption, by similarity and by captions each. The detector
    is a key of `DETECTORS`, by default the best that is there; the least probability is by default
    `LEAST_PROBABILITY` or, of the detector `fitted`, the one from which on that share of the
    verdicts that it was not fitted to are matches. Pairs that people `said` not to match are left
    out, and those said to match are in. Raises UserError if the detector needs what is missing, or
    the file cannot be written.
    """
    detector = detectors.best_available(judged) if detector is None else detector
    if least is None and detector == "fitted" and judged.fitted is not None:
        least = judged.fitted.threshold(LEAST_PROBABILITY)
    about = write_likely_matches(
        path,
        judged,
        detectors.judge_by(detector, judged),
        per_caption=per_query,
        least=LEAST_PROBABILITY if least is None else least,
        about={
            "detector": detector,
            "model": judged.name,
            "step": judged.step,
            "split": judged.split_name,
        },
        said=said,
    )
    precision = about.get("precision")
    shown = "" if precision is None else f", of which {precision:.1%} are in truth matches"
    return (
        f"detector {detector}: {about['matches']:,} pairs of probability "
        f"{about['least_probability']:g} or more{shown}; "
        + ("" if said is None else _heeded(about["refuted"], about["confirmed"]) + "; ")
        + f"written to {path}, for config.data.matches"
    )


def heed_verdicts(suspects: Suspects, judged: JudgedSplit, said: Pairs) -> Suspects:
    """Returns the suspects without those that people refuted, and with all that they confirmed.

    `said` is what most reviewers say of the split's unlabelled pairs, with `is_match`.
    """
    judge = detectors.judge_by(suspects.detector, judged)

    def judge_confirmed(pairs: Pairs) -> Pairs:
        return judge(pairs.replace(similarity=judged.similarity(pairs.caption, pairs.image)))

    pairs, refuted = suspects.pairs.heeding(said, judge_confirmed)
    return dataclasses.replace(suspects, pairs=pairs[_order(pairs)], refuted=refuted)


def _order(pairs):
    """Returns the rows of pairs, the most suspect first, those that are equal as they stand."""
    return np.lexsort((-pairs.score, -pairs.probability))


def heeded(suspects: Suspects) -> str:
    """Returns how many pairs people's verdicts have moved; "" where nobody was asked."""
    if suspects.pairs.is_match is None:
        return ""
    return _heeded(suspects.refuted, suspects.confirmed.sum(), suspects.of_labels)


def _heeded(out, within, of_labels=False):
    gone, kept = ("confirmed", "refuted") if of_labels else ("refuted", "confirmed")
    return f"{out:,} pairs that reviewers {gone} are left out, {within:,} that they {kept} are in"


def detector_quality(judged: JudgedSplit) -> dict[str, Any]:
    """Returns how good each detector that is there is, where the truth is known; else {}.

    Measured among the hardest candidates of random queries, as `detection_quality.quality` tells.
    """
    if judged.dataset.truth is None:
        return {}
    judges = {name: detectors.judge_by(name, judged) for name in detectors.available(judged)}
    candidates = detection_quality.split_candidates(judged, seed=judged.config.seed)
    return detection_quality.quality(judges, candidates, judged.dataset.truth.is_true)


def describe(judged: JudgedSplit, suspects: Suspects, quality: dict[str, Any]) -> str:
    """Returns what was found, as lines for a terminal; with its precision where truth is known."""
    of_step = "" if judged.step is None else f"step {judged.step}, "
    dataset, count = judged.dataset, len(suspects.pairs)
    lines = [
        f"{of_step}{judged.split_name}: {len(dataset.captions):,} captions, "
        f"{len(dataset.image_id):,} images",
        f"detector {suspects.detector}: {detectors.DETECTORS[suspects.detector].description}",
        f"{count:,} unlabelled pairs of probability {suspects.least:g} or more among the "
        f"{suspects.per_query} best of each caption and image",
    ]
    more = [heeded(suspects), precision_text(dataset, suspects.pairs)]
    return "\n".join([*lines, *filter(None, more), *_quality_lines(quality)])


def _quality_lines(quality):
    """Returns a line for each detector, direction and number of hardest candidates."""
    lines = []
    for name, of_detector in quality.items():
        for among, scores in of_detector.items():
            direction, count = among.split("_hardest_")
            of = f"{name}, {direction}, hardest {count} of a query, {scores['density']:.1%} matches"
            if scores["roc_auc"] is None:
                lines.append(f"{of}: nothing to tell apart")
                continue
            lines.append(
                f"{of}: AUC {scores['roc_auc']:.3f}, AP {scores['average_precision']:.3f}, "
                f"precision at recall 0.3 {scores['precision_at_recall_0.3']:.1%}"
            )
    return lines


def precision_text(dataset: PairDataset, pairs: Pairs) -> str:
    """Returns what share of the first hundred pairs, and of random ones, is in truth a match.

    Returns "" where the truth is not known, or there are no pairs.
    """
    if dataset.truth is None or not len(pairs):
        return ""
    pairs = pairs[:_PRECISION_AT]
    right = dataset.truth.is_true(pairs.caption, pairs.image)
    rng = np.random.default_rng(0)
    caption = rng.integers(len(dataset.captions), size=_RANDOM_PAIRS)
    image = rng.integers(len(dataset.image_id), size=_RANDOM_PAIRS)
    other = image != dataset.caption_image[caption]
    random = dataset.truth.is_true(caption[other], image[other])
    return (
        f"precision at {len(right)}: {right.mean():.1%} are in truth matches, "
        f"{random.mean():.2%} of unlabelled pairs drawn at random"
    )

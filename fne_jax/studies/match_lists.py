"""Matches beyond the labels that a study's runs take from their warm-up: `config.data.matches`."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
from collections.abc import Callable

from fne_jax.data import match_files
from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.model.model import restore_model
from fne_jax.retrieval import detectors, fitted_detector, pair_features, verdict_samples
from fne_jax.retrieval.likely_matches import LEAST_PROBABILITY, write_likely_matches
from fne_jax.studies import detector

# What finds the matches: detectors that ask nobody, and one that is fitted to so many verdicts.
SOURCES = ("similarity", "gaussians", "captions", "words", "identical", "fittedN")
_FITTED = re.compile(r"fitted([1-9]\d*)")
# Images of either kind that are judged of each caption.
PER_CAPTION = 150
_log = logging.getLogger(__name__)


def is_source(name: str) -> bool:
    """Returns whether a name is one of `SOURCES`, such as `words` or `fitted1000`."""
    return name in SOURCES[:-1] or _FITTED.fullmatch(name) is not None


def check_source(name: str, train: PairDataset) -> None:
    """Raises UserError if a source takes verdicts that nobody can give.

    Args:
      name: One of `SOURCES`, or "".
      train: The training split.
    """
    if _FITTED.fullmatch(name) and train.truth is None:
        raise UserError(
            f"--objectives: {name} takes verdicts by the truth, which nobody knows of this dataset"
        )


def path(warmup: pathlib.Path, source: str) -> pathlib.Path:
    """Returns the file of the matches that a source finds by a warm-up's encoders."""
    return warmup / f"matches_{source}{match_files.SUFFIX}"


def ensure(warmup: pathlib.Path, source: str) -> None:
    """Writes the file of matches unless it is there.

    Args:
      warmup: The folder of a warm-up that has ended.
      source: One of `SOURCES`. Of `fittedN` the truth gives the verdicts.

    Raises:
      UserError: if the source cannot judge by what the warm-up left, or the file cannot be written.
    """
    if path(warmup, source).exists():
        return
    model = restore_model(warmup, "latest")
    train = model.load_split("train")
    evidence = detector.embedded_evidence(model, train)
    verdicts = _FITTED.fullmatch(source)
    if verdicts:
        judge, least = _fitted(evidence, train, int(verdicts[1]), model.config.seed)
    else:
        judge, least = detectors.fitted(source, evidence), LEAST_PROBABILITY
    written = write_likely_matches(
        path(warmup, source),
        train,
        evidence,
        judge,
        per_caption=PER_CAPTION,
        least=least,
        about={"detector": source, "step": model.step},
    )
    if not written["matches"]:
        _log.warning(
            "%s: no pair is likely enough to be a match; runs with this list are those without it",
            path(warmup, source),
        )


def _fitted(
    evidence: detectors.Evidence, train: PairDataset, verdicts: int, seed: int
) -> tuple[Callable[[detectors.PairsToJudge], detectors.Judgement], float]:
    """Returns a detector fitted to what the truth says of a sample, and its least probability.

    That is the one from which on `LEAST_PROBABILITY` of the verdicts that it was not fitted to are
    matches.
    """
    split = detector.split_inputs(evidence)
    drawn = verdict_samples.sample(split, verdicts, seed)
    table = pair_features.features(split, drawn.caption, drawn.image)
    is_match = train.truth.is_true(drawn.caption, drawn.image)
    found = fitted_detector.fit(table, is_match, drawn.weight, seed)

    judge = detectors.fitted("fitted", dataclasses.replace(evidence, fitted=found))
    return judge, found.threshold(LEAST_PROBABILITY)

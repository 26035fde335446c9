"""The lists of matches that a study finds for its runs: their `config.data.matches`."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re

from fne_jax.data import match_files
from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.false_negatives import fitted_detector, pair_features, verdict_samples
from fne_jax.false_negatives.detectors import judge_by
from fne_jax.false_negatives.judged_split import embed
from fne_jax.false_negatives.likely_matches import LEAST_PROBABILITY, write_likely_matches
from fne_jax.model.model import load_workdir

# What finds the matches: detectors that ask nobody, and one that is fitted to so many verdicts.
SOURCES = ("similarity", "gaussians", "captions", "words", "identical", "fittedN")
_FITTED = re.compile(r"fitted([1-9]\d*)")
# Images of either kind that are judged of each caption.
PER_CAPTION = 150
_log = logging.getLogger(__name__)


def is_source(name: str) -> bool:
    """Returns whether a name is one of `SOURCES`, such as `words` or `fitted1000`."""
    return name in SOURCES[:-1] or _FITTED.fullmatch(name) is not None


@dataclasses.dataclass(frozen=True)
class MatchList:
    """A list of matches that a study finds by the encoders of a warm-up or of a finished run.

    Attributes:
      folder: The folder of either, where the list lies.
      source: One of `SOURCES`.
      least: The least probability that it lists; 0 for `LEAST_PROBABILITY`, or where the fitted
        detector is as precise.
    """

    folder: pathlib.Path
    source: str
    least: float = 0.0

    @property
    def path(self) -> pathlib.Path:
        """The file of the list."""
        least = f"_from{self.least}" if self.least else ""
        return self.folder / f"matches_{self.source}{least}{match_files.SUFFIX}"


def check_source(wanted: MatchList, train: PairDataset) -> None:
    """Raises UserError if a list takes verdicts by a truth that the training split lacks."""
    if _FITTED.fullmatch(wanted.source) and train.truth is None:
        raise UserError(
            f"--objectives: {wanted.source} takes verdicts by the truth, which nobody knows of "
            "this dataset"
        )


def write(wanted: MatchList) -> None:
    """Writes the file of a list, by the trained encoders in its folder; verdicts are by the truth.

    Raises UserError if the source cannot judge by these encoders, or the file cannot be written.
    """
    model = load_workdir(wanted.folder, "latest")
    train = model.load_split("train")
    split = embed(model, train)
    verdicts, least, said = _FITTED.fullmatch(wanted.source), LEAST_PROBABILITY, None
    if verdicts:
        fitted, said = _fitted(split, int(verdicts[1]), model.config.seed)
        split, least = dataclasses.replace(split, fitted=fitted), fitted.threshold(least)
    written = write_likely_matches(
        wanted.path,
        split,
        judge_by("fitted" if verdicts else wanted.source, split),
        per_caption=PER_CAPTION,
        least=wanted.least or least,
        about={"detector": wanted.source, "step": model.step},
        said=said,
    )
    if not written["matches"]:
        _log.warning(
            "%s: no pair is likely enough to be a match; runs with it equal those without",
            wanted.path,
        )


def _fitted(split, verdicts, seed):
    """Returns a detector fitted to what the truth says of a sample of so many pairs, and these."""
    drawn = verdict_samples.sample(split, verdicts, seed)
    table = pair_features.features(split, drawn.caption, drawn.image)
    is_match = split.dataset.truth.is_true(drawn.caption, drawn.image)
    detector = fitted_detector.fit(table, is_match, drawn.weight, seed)
    return detector, drawn.replace(is_match=is_match)

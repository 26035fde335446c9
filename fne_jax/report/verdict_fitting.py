"""What is learnt from verdicts on a split: a fitted detector, and how many pairs match at all."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fne_jax.data.verdict_store import read_any
from fne_jax.data.verdicts import MATCH, Verdict, agreed, rows_of
from fne_jax.errors import UserError
from fne_jax.report.suspects import JudgedSplit
from fne_jax.retrieval import fitted_detector
from fne_jax.retrieval.fitted_detector import FittedDetector
from fne_jax.retrieval.pair_features import SplitInputs, features
from fne_jax.retrieval.verdict_samples import density

# Of which the threshold is told.
_PRECISIONS = (0.5, 0.8, 0.9)


def fit_and_write(judged: JudgedSplit, verdicts: pathlib.Path, path: pathlib.Path) -> JudgedSplit:
    """Fits a detector to a file of verdicts, tells how good it is, and returns the split with it.

    Args:
      judged: The split.
      verdicts: A store of verdicts, or a `.csv` or `.jsonl` of them.
      path: Where to write the detector.

    Raises:
      UserError: if the verdicts cannot be read or are too few, or the detector cannot be written.
    """
    given = read_any(verdicts, judged.dataset, judged.split_name)
    detector = fit_detector(judged, given)
    fitted_detector.write(path, detector)
    print(describe(detector))
    print(f"written to {path}")
    return dataclasses.replace(judged, fitted=detector)


def split_inputs(judged: JudgedSplit) -> SplitInputs:
    """Returns what features are taken from, of a split."""
    return SplitInputs(
        judged.embedded.image_emb,
        judged.embedded.text_emb,
        judged.caption_bank,
        judged.dataset.captions,
        judged.dataset.caption_image,
    )


def fit_detector(judged: JudgedSplit, verdicts: Sequence[Verdict], seed: int = 0) -> FittedDetector:
    """Returns a detector fitted to what most reviewers say of each unlabelled pair.

    Args:
      judged: The split.
      verdicts: Each reviewer's last verdict on each of its pairs.
      seed: The seed of the folds.

    Raises:
      UserError: if they are too few.
    """
    kept = agreed(verdicts)
    caption, image = rows_of(kept, judged.dataset)
    other = judged.dataset.caption_image[caption] != image
    kept = [verdict for verdict, unlabelled in zip(kept, other, strict=True) if unlabelled]
    is_match = np.array([verdict.verdict == MATCH for verdict in kept], bool)
    weight = weights(kept)
    drawn = np.isfinite(weight)
    about = {"run": judged.name, "step": judged.step, "split": judged.split_name}
    about["samples"] = sorted({verdict.sample for verdict in kept if verdict.sample})
    if drawn.any():
        about["density"] = dataclasses.asdict(density(is_match[drawn], weight[drawn]))
    table = features(split_inputs(judged), caption[other], image[other])
    return fitted_detector.fit(table, is_match, weight, seed, about)


def weights(verdicts: Sequence[Verdict]) -> np.ndarray:
    """Returns [n] float64, how many unlabelled pairs each verdict stands for; NaN if not known.

    Each of several samples stands for all pairs by itself. Together each stands for its share.
    """
    drawn = [verdict.sample if verdict.weight is not None else None for verdict in verdicts]
    number = Counter(drawn)
    total = len(verdicts) - number[None]
    return np.array(
        [
            np.nan if sample is None else verdict.weight * number[sample] / total
            for verdict, sample in zip(verdicts, drawn, strict=True)
        ]
    )


def describe(detector: FittedDetector) -> str:
    """Returns what a detector was fitted to and how good it is, as lines for a terminal."""
    about = detector.about
    step = "" if about.get("step") is None else f", step {about['step']}"
    lines = [
        f"fitted to {about['verdicts']:,} verdicts on {about['split']}, {about['matches']:,} of "
        f"them matches, by the embeddings of {about['run']}{step}",
    ]
    found = about["density"]
    lines.append(
        f"{found['value']:.2%} of all unlabelled pairs match ({found['low']:.2%} to "
        f"{found['high']:.2%}, 95 % interval): what config.fne.prior should be"
    )
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

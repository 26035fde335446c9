"""The options of commands that look for suspects."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import pathlib

from fne_jax.errors import UserError
from fne_jax.false_negatives import fitted_detector, suspects
from fne_jax.false_negatives.detectors import DETECTORS, PREFERENCE
from fne_jax.false_negatives.fitted_detector import FittedDetector
from fne_jax.false_negatives.judged_split import JudgedSplit
from fne_jax.false_negatives.suspects import Suspects

_PER_QUERY = 5
# What does not go with labelled pairs, where a command has it.
_OF_UNLABELLED = ("per_query", "detector", "fitted", "min_probability", "matches")
_OF_UNLABELLED += ("sample", "for_evaluation")
_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says which pairs are suspected, and by what."""
    named = DETECTORS.items()
    parser.add_argument(
        "--per-query",
        type=int,
        help=f"pairs considered of each caption and image; {_PER_QUERY} by default",
    )
    parser.add_argument("--limit", type=int, default=1000, help="most pairs listed")
    parser.add_argument(
        "--labels",
        action="store_true",
        help="instead of unlabelled pairs, list captions that may be wrong for their own image",
    )
    parser.add_argument(
        "--detector",
        choices=list(DETECTORS),
        help=f"what judges the pairs; by default the first of {', '.join(PREFERENCE)} that can. "
        + "; ".join(f"{name}: {one.description}; needs {one.needs}" for name, one in named),
    )
    parser.add_argument(
        "--caption-embeddings",
        metavar="FILE.npy",
        help="for the detector external: [captions, dim] floats of any sentence encoder, in the "
        "order that `convert order` writes",
    )
    parser.add_argument(
        "--fitted",
        metavar="FILE.json",
        help="for the detector fitted: what was fitted to verdicts by `audit --verdicts`",
    )
    parser.add_argument(
        "--min-probability",
        type=float,
        help="least probability of a pair; config.fne.posterior_threshold by default",
    )


def check(options: argparse.Namespace) -> None:
    """Checks the values of these options.

    Raises UserError, naming one that is out of its range.
    """
    for name in _OF_UNLABELLED if options.labels else ():
        if getattr(options, name, None) is not None:
            raise UserError(f"--{name.replace('_', '-')} does not go with --labels")
    for name in ("per_query", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 1"
            )
    if options.min_probability is not None and not 0 <= options.min_probability <= 1:
        raise UserError(f"--min-probability is {options.min_probability}; expected 0 to 1")
    if options.detector == "external" and options.caption_embeddings is None:
        raise UserError("--detector=external takes --caption-embeddings, an .npy file")
    if options.fitted is not None and not options.fitted.endswith(".json"):
        raise UserError(f"--fitted={options.fitted}: expected a name that ends in .json")
    if options.detector == "fitted" and options.fitted is None:
        raise UserError("--detector=fitted takes --fitted, a file that `audit --verdicts` writes")


def read_fitted(options: argparse.Namespace) -> FittedDetector | None:
    """Returns the fitted detector that the options name, or None.

    Raises UserError if its file cannot be read.
    """
    if options.fitted is None:
        return None
    return fitted_detector.read(pathlib.Path(options.fitted))


def with_fitted(judged: JudgedSplit, fitted: FittedDetector | None) -> JudgedSplit:
    """Returns a split with a fitted detector, if there is one.

    Warns where it was fitted to other embeddings.
    """
    if fitted is None:
        return judged
    here = {"run": judged.name, "step": judged.step, "split": judged.split_name}
    learnt = {name: fitted.about.get(name, value) for name, value in here.items()}
    if learnt != here:
        _log.warning(
            "the detector of --fitted learnt from verdicts on %s, not on %s: its probabilities are "
            "not calibrated here",
            *(_named(learnt), _named(here)),
        )
    return dataclasses.replace(judged, fitted=fitted)


def _named(of):
    step = "" if of["step"] is None else f"step {of['step']} of "
    return f"the split {of['split']} by {step}{of['run']}"


def find(options: argparse.Namespace, judged: JudgedSplit) -> Suspects:
    """Returns the suspects that the options ask for."""
    return suspects.find_suspects(
        judged,
        per_query=options.per_query or _PER_QUERY,
        detector=options.detector,
        least=options.min_probability,
    )

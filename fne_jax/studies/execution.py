"""The work of a study: shared warm-ups, the runs that go on from them, and what they measured."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from fne_jax import configuration
from fne_jax.evaluation import generality
from fne_jax.evaluation.metrics import complete_metrics, retrieval_metrics
from fne_jax.files import whole_folder, write_atomically
from fne_jax.model.model import load_workdir
from fne_jax.studies import detector, match_lists
from fne_jax.studies.cells import Cell, Run
from fne_jax.training.loop import train_and_evaluate
from fne_jax.training.metric_log import read_metrics

RESULT_NAME, LOG_NAME = "study.json", "study.log"
_DONE_NAME = "warmup.json"  # in a warm-up's folder once it has ended


def warmup_is_done(run: Run, also_for_matches: bool) -> bool:
    """Returns whether a run, and its list of matches if still to be made, need no warm-up more."""
    begun = (run.workdir / configuration.FILE_NAME).exists() and not also_for_matches
    return begun or (run.warmup / _DONE_NAME).exists()


def train_warmup(run: Run) -> None:
    """Trains the warm-up that the run shares with others; raises UserError if it cannot."""
    with _logging_to(run.warmup / LOG_NAME):
        train_and_evaluate(run.warmup_config, run.warmup, warmup_only=True)
    _write_json(run.warmup / _DONE_NAME, {"of": str(run.workdir)})


def find_matches(run: Run) -> None:
    """Writes the list of matches that the run takes; raises UserError if it cannot."""
    match_lists.write(run.matches)


def train_and_measure(run: Run) -> None:
    """Trains a run from the end of its warm-up, tests its last weights, and writes the result.

    It is bit-identical to one trained alone: the warm-up depends on nothing that follows it.

    Raises UserError if the run cannot be trained, or its folder cannot be made.
    """
    if run.warmup is not None and not run.workdir.exists():
        with whole_folder(run.workdir) as folder:
            shutil.copytree(run.warmup, folder, dirs_exist_ok=True)
            for own in (configuration.FILE_NAME, _DONE_NAME, LOG_NAME):
                (folder / own).unlink()
            configuration.store_config(run.config, folder)
    with _logging_to(run.workdir / LOG_NAME):
        train_and_evaluate(run.config, run.workdir)
    _write_json(run.workdir / RESULT_NAME, measured(run))


def read_results(runs: Sequence[Run]) -> dict[Cell, dict[int, dict[str, Any]]]:
    """Returns what `measured` returned of the runs that have ended, by cell and seed.

    Raises UserError if a folder holds a run of another config.
    """
    results: dict[Cell, dict[int, dict[str, Any]]] = {run.cell: {} for run in runs}
    for run in runs:
        path = run.workdir / RESULT_NAME
        if path.exists():
            configuration.store_config(run.config, run.workdir)  # checks it
            results[run.cell][run.seed] = json.loads(path.read_text())
    return {cell: of for cell, of in results.items() if of}


def measured(run: Run) -> dict[str, Any]:
    """Returns the test metrics of a trained run's last weights and how it treated its negatives.

    These are `retrieval_metrics`; where the truth is known `complete_metrics`, `controlled_metrics`
    with weights chosen on the validation split, and `detector.measure`; and the means over the
    steps after the warm-up of `sampled_false_negative_rate` and `hardest_false_negative_rate`.
    """
    model = load_workdir(run.workdir, "latest")
    test = model.load_evaluation_split("test")
    split = model.embed_split(test)
    result = retrieval_metrics(split.image_emb, split.text_emb, split.caption_image)
    if split.truth is not None:
        embedded = split.image_emb, split.text_emb, split.truth
        words = generality.word_counts(test.captions)
        result |= complete_metrics(*embedded)
        val = model.load_evaluation_split("val")
        of_val, words_of_val = model.embed_split(val), generality.word_counts(val.captions)
        weights = generality.choose_weights(
            of_val.image_emb, of_val.text_emb, of_val.truth, words_of_val
        )
        result |= generality.controlled_metrics(*embedded, words, weights)
    lines = read_metrics(run.workdir)
    for name in ("sampled_false_negative_rate", "hardest_false_negative_rate"):
        logged = [line[name] for line in lines if name in line]
        if logged:
            result[name] = float(np.mean(logged))
    train = model.load_split("train")
    if train.truth is not None:
        result |= detector.measure(model, train)
    return result


@contextlib.contextmanager
def _logging_to(path):
    """Sends the package's log to a file, to which a restart adds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("fne_jax")
    handler, propagate = logging.FileHandler(path), logger.propagate
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)
        handler.close()


def _write_json(path, content):
    write_atomically(path, json.dumps(content, indent=2) + "\n")

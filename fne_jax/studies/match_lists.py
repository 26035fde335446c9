"""Matches beyond the labels that a study's runs take from their warm-up: `config.data.matches`."""

from __future__ import annotations

import dataclasses
import pathlib

import jax

from fne_jax.data import match_files
from fne_jax.data.match_files import KnownPairs
from fne_jax.data.pairs import PairDataset
from fne_jax.model.model import Model, restore_model
from fne_jax.retrieval import detectors
from fne_jax.retrieval.likely_matches import likely_matches

# What finds the matches: detectors that ask nobody.
SOURCES = ("similarity", "gaussians", "captions", "words", "identical")
# Of a pair being a match: in trials with the truth in hand, a detector that is right in 4 of 5
# of its finds was worth most of what the truth is worth, one that is right in half of them nothing.
LEAST_PROBABILITY = 0.8
# Images of either kind that are judged of each caption.
PER_CAPTION = 150


def is_source(name: str) -> bool:
    """Returns whether a name is one of `SOURCES`."""
    return name in SOURCES


def path(warmup: pathlib.Path, source: str) -> pathlib.Path:
    """Returns the file of the matches that a source finds by a warm-up's encoders."""
    return warmup / f"matches_{source}{match_files.SUFFIX}"


def ensure(warmup: pathlib.Path, source: str) -> None:
    """Writes the file of matches unless it is there.

    Args:
      warmup: The folder of a warm-up that has ended.
      source: One of `SOURCES`.

    Raises:
      UserError: if the source cannot judge by what the warm-up left, or the file cannot be written.
    """
    if path(warmup, source).exists():
        return
    model = restore_model(warmup, "latest")
    train = model.load_split("train")
    evidence = _evidence(model, train)
    found = likely_matches(
        detectors.fitted(source, evidence),
        evidence.image_emb,
        evidence.text_emb,
        evidence.caption_bank,
        evidence.caption_image,
        per_caption=PER_CAPTION,
        least=LEAST_PROBABILITY,
    )
    about = {"detector": source, "step": model.step, "least_probability": LEAST_PROBABILITY}
    if train.truth is not None and len(found.caption):
        about["precision"] = float(train.truth.is_true(found.caption, found.image).mean())
    match_files.write_match_list(
        path(warmup, source),
        train,
        KnownPairs(found.caption, found.image),
        found.probability,
        about,
    )


def _evidence(model: Model, train: PairDataset) -> detectors.Evidence:
    # The matrix of all true matches, large for a training split, is not needed.
    split = model.embed_split(dataclasses.replace(train, truth=None))
    tokens = model.tokenize(train.captions, model.config.evaluation.text_length)
    return detectors.Evidence(
        captions=train.captions,
        caption_image=train.caption_image,
        images=len(train.image_id),
        prior=model.config.fne.prior,
        stats=jax.device_get(model.stats),
        min_count=model.config.fne.min_count,
        caption_bank=model.embedder.captions(model.momentum_params, tokens),
        image_emb=split.image_emb,
        text_emb=split.text_emb,
    )

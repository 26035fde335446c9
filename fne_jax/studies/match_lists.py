"""Matches beyond the labels that a study's runs take from their warm-up: `config.data.matches`."""

from __future__ import annotations

import dataclasses
import pathlib

import jax

from fne_jax.data import match_files
from fne_jax.data.pairs import PairDataset
from fne_jax.model.model import Model, restore_model
from fne_jax.retrieval import detectors
from fne_jax.retrieval.likely_matches import LEAST_PROBABILITY, write_likely_matches

# What finds the matches: detectors that ask nobody.
SOURCES = ("similarity", "gaussians", "captions", "words", "identical")
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
    write_likely_matches(
        path(warmup, source),
        train,
        _evidence(model, train),
        source,
        per_caption=PER_CAPTION,
        least=LEAST_PROBABILITY,
        about={"step": model.step},
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

"""The objective of each phase of a run, as one signature that the train step calls."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import ml_collections

from fne_jax.errors import UserError
from fne_jax.objectives.contrastive import clip_loss, infonce_loss
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.similarity_statistics import SimilarityStatistics
from fne_jax.objectives.triplet_loss import (
    TripletAux,
    fne_triplet_loss,
    hardest_negative_triplet_loss,
)


@flax.struct.dataclass
class Features:
    """The embeddings of a batch and what is known of its pairs.

    Attributes:
      image: [batch, dim] online image embeddings.
      text: [batch, dim] online text embeddings.
      momentum_image: [batch, dim] momentum image embeddings.
      momentum_text: [batch, dim] momentum text embeddings.
      image_id: [batch] int32.
      same_image: [batch, batch] bool, which pairs count as one image in the batch.
    """

    image: jax.Array
    text: jax.Array
    momentum_image: jax.Array
    momentum_text: jax.Array
    image_id: jax.Array
    same_image: jax.Array


Objective = Callable[
    [jax.Array, Features, MemoryQueue, SimilarityStatistics], tuple[jax.Array, TripletAux | None]
]


def fne_objective(rng, features, queue, stats, **settings):
    """`fne_triplet_loss` as an Objective."""
    return fne_triplet_loss(
        rng,
        features.image,
        features.text,
        features.momentum_image,
        features.momentum_text,
        features.image_id,
        queue,
        stats,
        **settings,
    )


def hardest_objective(rng, features, queue, stats, *, margin):
    """`hardest_negative_triplet_loss` as an Objective."""
    del rng, queue, stats
    loss = hardest_negative_triplet_loss(
        features.image, features.text, margin=margin, same_image=features.same_image
    )
    return loss, None


def infonce_objective(rng, features, queue, stats, *, temperature):
    """`infonce_loss` as an Objective."""
    del rng, stats
    loss = infonce_loss(
        features.image,
        features.text,
        features.momentum_image,
        features.momentum_text,
        features.image_id,
        queue,
        temperature=temperature,
    )
    return loss, None


def clip_objective(rng, features, queue, stats, *, temperature):
    """`clip_loss` as an Objective."""
    del rng, queue, stats
    loss = clip_loss(
        features.image,
        features.text,
        temperature=temperature,
        same_image=features.same_image,
    )
    return loss, None


def main_objective(config: ml_collections.ConfigDict) -> Objective:
    """Returns the objective after the warm-up."""
    fne = config.fne
    return functools.partial(
        fne_objective,
        margin=fne.margin,
        decay=fne.decay,
        prior=fne.prior,
        posterior_threshold=fne.posterior_threshold,
        min_count=fne.min_count,
    )


def warmup_objective(config: ml_collections.ConfigDict) -> Objective:
    """Returns the objective of the warm-up.

    Raises:
      UserError: if `config.warmup.objective` is unknown.
    """
    warmup = config.warmup
    if warmup.objective == "hardest":
        return functools.partial(hardest_objective, margin=config.fne.margin)
    if warmup.objective == "infonce":
        return functools.partial(infonce_objective, temperature=warmup.temperature)
    if warmup.objective == "clip":
        return functools.partial(clip_objective, temperature=warmup.temperature)
    raise UserError(
        f"config.warmup.objective is {warmup.objective!r}; expected hardest, infonce or clip"
    )

"""The objective of each phase of a run, as one signature that the train step calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections

from fne_jax.errors import UserError
from fne_jax.objectives.contrastive import clip_loss, infonce_loss, sigmoid_loss
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.negative_mining import (
    hardest_key,
    mined_triplet_loss,
    random_key,
    semi_hard_key,
)
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    update_similarity_statistics,
)
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
    [jax.Array, Features, MemoryQueue | None, SimilarityStatistics],
    tuple[jax.Array, TripletAux | None],
]


def key_objective(rng, features, queue, stats, *, loss, **settings):
    """`fne_triplet_loss`, or a loss that takes and returns the same, as an Objective."""
    return loss(
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


def sigmoid_objective(rng, features, queue, stats, *, temperature, bias):
    """`sigmoid_loss` as an Objective."""
    del rng, queue, stats
    loss = sigmoid_loss(
        features.image,
        features.text,
        temperature=temperature,
        bias=bias,
        same_image=features.same_image,
    )
    return loss, None


def within_the_batch(objective: Objective) -> Objective:
    """Returns an objective whose candidates are the batch's own keys, without the memory."""

    def without_memory(rng, features, queue, stats):
        del queue
        return objective(rng, features, None, stats)

    return without_memory


def main_objective(config: ml_collections.ConfigDict) -> Objective:
    """Returns the objective after the warm-up, `config.objective`.

    Raises:
      UserError: if `config.objective.name` or `config.fne.elimination` is unknown.
    """
    fne, chosen = config.fne, config.objective
    mined = functools.partial(
        key_objective, loss=mined_triplet_loss, margin=fne.margin, prior=fne.prior
    )
    hardest = functools.partial(mined, rule=hardest_key)
    if not chosen.memory:
        # Within the batch, VSE++ compares online embeddings, and both sides learn.
        hardest = functools.partial(hardest_objective, margin=fne.margin)
    objectives = {
        "fne": functools.partial(key_objective, loss=fne_triplet_loss, **sampling_settings(fne)),
        "hardest": hardest,
        "semi_hard": functools.partial(mined, rule=semi_hard_key),
        "random": functools.partial(mined, rule=random_key),
        "infonce": functools.partial(infonce_objective, temperature=chosen.temperature),
        "sigmoid": functools.partial(
            sigmoid_objective, temperature=chosen.temperature, bias=chosen.bias
        ),
    }
    objective = objectives[_one_of("objective.name", chosen.name, objectives)]
    return objective if chosen.memory else within_the_batch(objective)


def sampling_settings(fne: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns `fne_triplet_loss`'s settings, as `config.fne` says.

    Raises:
      UserError: if `config.fne.elimination` is unknown.
    """
    return candidate_settings(fne) | {"key_chunk": fne.key_chunk or None}


def candidate_settings(fne: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns `sampling_weights`'s settings, its parts switched on or off as `config.fne` says.

    Raises:
      UserError: if `config.fne.elimination` is unknown.
    """
    eliminations = {
        "soft": {"elimination_decay": fne.decay, "posterior_threshold": fne.posterior_threshold},
        # exp(-1e30 P) is 0 for every P above the threshold.
        "hard": {"elimination_decay": 1e30, "posterior_threshold": fne.posterior_threshold},
        "none": {"elimination_decay": fne.decay, "posterior_threshold": 1.0},
    }
    return {
        **eliminations[_one_of("fne.elimination", fne.elimination, eliminations)],
        "decay": fne.decay if fne.cut_down else 0.0,
        "margin": fne.margin,
        "prior": fne.prior,
        "min_count": fne.min_count,
        "monotone": fne.monotone,
    }


def warmup_objective(config: ml_collections.ConfigDict) -> Objective:
    """Returns the objective of the warm-up.

    Raises:
      UserError: if `config.warmup.objective` is unknown.
    """
    warmup = config.warmup
    objectives = {
        "hardest": functools.partial(hardest_objective, margin=config.fne.margin),
        "infonce": functools.partial(infonce_objective, temperature=warmup.temperature),
        "clip": functools.partial(clip_objective, temperature=warmup.temperature),
    }
    return objectives[_one_of("warmup.objective", warmup.objective, objectives)]


# Of the statistics so far, the step's number, and the batch.
NextStatistics = Callable[[SimilarityStatistics, jax.Array, Features], SimilarityStatistics]


def next_statistics(fne: ml_collections.ConfigDict, steps_per_epoch: int) -> NextStatistics:
    """Returns how a step's batch enters the statistics: reset at each epoch, or decayed."""
    if fne.statistics_keep == 1:

        def next_of_epoch(stats, step, features):
            starts_epoch = step % steps_per_epoch == 0
            stats = jax.tree.map(lambda value: jnp.where(starts_epoch, 0.0, value), stats)
            return update_similarity_statistics(
                stats, features.image, features.text, features.same_image
            )

        return next_of_epoch

    def next_decayed(stats, step, features):
        del step
        return update_similarity_statistics(
            stats, features.image, features.text, features.same_image, keep=fne.statistics_keep
        )

    return next_decayed


def _one_of(field, value, names):
    if value not in names:
        raise UserError(f"config.{field} is {value!r}; expected one of {', '.join(names)}")
    return value

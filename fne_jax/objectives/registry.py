"""Every training objective: its loss, its settings by the config, and what else a run is to know.

To add an objective, add an entry to `OBJECTIVES` (and the fields that it reads to configs/base.py).
Training and the study take it from here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from fne_jax.errors import UserError
from fne_jax.objectives import learned_scalars
from fne_jax.objectives.contrastive import (
    clip_loss,
    infonce_loss,
    multi_positive_loss,
    sigmoid_loss,
)
from fne_jax.objectives.features import Features
from fne_jax.objectives.fne_loss import fne_triplet_loss
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.negative_mining import (
    hardest_negative,
    mined_triplet_loss,
    random_negative,
    semi_hard_negative,
)
from fne_jax.objectives.similarity_statistics import SimilarityStatistics
from fne_jax.objectives.teacher import soft_target_loss
from fne_jax.objectives.triplet_loss import TripletAux, hardest_negative_triplet_loss

# What `config.objective.oracle` may be, of the matches that the training split's truth tells:
# nothing; they are left out of the negatives; they are positives beside the labelled ones.
NO_ORACLE, DROP, POSITIVES = ORACLES = ("none", "drop", "positives")

# What `config.fne.elimination` may be.
SOFT, HARD, NO_ELIMINATION = ELIMINATIONS = ("soft", "hard", "none")

# What `config.fne.posterior` may be.
GAUSSIANS, LISTED = POSTERIORS = ("gaussians", "listed")

# exp(-1e30 P) is 0 in float32 for every posterior P that is worth the name.
_NEVER_SAMPLED_TAU = 1e30

# Maps the features of a batch, the queue, the updated statistics and a PRNG key to the loss and,
# for losses that choose negatives, what they chose.
Objective = Callable[
    [Features, MemoryQueue | None, SimilarityStatistics, jax.Array],
    tuple[jax.Array, TripletAux | None],
]

# Maps a config to the keyword arguments of a loss.
Settings = Callable[[ml_collections.ConfigDict], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A training objective.

    Attributes:
      loss: The loss, an Objective but for its settings.
      settings: Its settings after the warm-up.
      takes_positives: Whether an anchor may have several positives.
      uses_keys: Whether it compares anchors with momentum embeddings.
    """

    loss: Callable[..., tuple[jax.Array, TripletAux | None]]
    settings: Settings
    takes_positives: bool = False
    uses_keys: bool = True


def weighing_settings(fne: ml_collections.ConfigDict, *, listed: bool = False) -> dict[str, Any]:
    """Returns the settings of `sampling_weights`, parts of it switched off as `config.fne` says.

    Unless candidates are `listed` with their probability, `fne.posterior=listed` suspects none.
    """
    hard = fne.elimination == HARD
    none = fne.elimination == NO_ELIMINATION or (fne.posterior == LISTED and not listed)
    elimination_tau = fne.tau if fne.elimination_tau is None else fne.elimination_tau
    return {
        "margin": fne.margin,
        "tau": fne.tau if fne.cut_down else 0.0,
        "elimination_tau": _NEVER_SAMPLED_TAU if hard else elimination_tau,
        "prior": fne.prior,
        "posterior_threshold": 1.0 if none else fne.posterior_threshold,
        "min_count": fne.min_count,
        "monotone": fne.monotone,
    }


def _fne(config):
    return weighing_settings(config.fne, listed=True) | {"key_chunk": config.fne.key_chunk or None}


def _mined(config):
    return {"margin": config.fne.margin, "prior": config.fne.prior}


def _temperature(config):
    return {"temperature": config.objective.temperature}


def _several_positives(config):
    positives = config.objective.oracle == POSITIVES or bool(config.data.matches)
    return _temperature(config) | {"matches_are_positives": positives}


# By the value of `config.objective.name`.
OBJECTIVES: dict[str, Entry] = {
    "fne": Entry(fne_triplet_loss, _fne),
    "hardest": Entry(functools.partial(mined_triplet_loss, rule=hardest_negative), _mined),
    "semi_hard": Entry(functools.partial(mined_triplet_loss, rule=semi_hard_negative), _mined),
    "random": Entry(functools.partial(mined_triplet_loss, rule=random_negative), _mined),
    "infonce": Entry(infonce_loss, _temperature),
    "sigmoid": Entry(
        sigmoid_loss,
        lambda config: _several_positives(config) | {"bias": config.objective.bias},
        takes_positives=True,
        uses_keys=False,
    ),
    "clip": Entry(clip_loss, _temperature, uses_keys=False),
    "multi_positive": Entry(
        multi_positive_loss, _several_positives, takes_positives=True, uses_keys=False
    ),
}

# By the value of `config.warmup.objective`: a loss and its settings.
WARMUP: dict[str, tuple[Callable, Settings]] = {
    "hardest": (hardest_negative_triplet_loss, lambda config: {"margin": config.fne.margin}),
    **{
        name: (loss, lambda config: {"temperature": config.warmup.temperature})
        for name, loss in (("infonce", infonce_loss), ("clip", clip_loss))
    },
}

# The fields of `config.objective` and `config.fne` on which any warm-up depends.
WARMUP_FIELDS = {
    "objective.learn_temperature",  # what a checkpoint holds, of the warm-up too
    "fne.start_epoch",
    "fne.mask_same_image",
    "fne.ema_decay",
}

# Parts of FNE switched off, for ablations: a name, and what changes in a config.
FNE_VARIANTS: dict[str, dict[str, str]] = {
    "fne_no_queue": {"objective.queue": "False"},
    "fne_no_elimination": {"fne.elimination": NO_ELIMINATION},
    "fne_no_cutdown": {"fne.cut_down": "False"},
}


def main_objective(config: ml_collections.ConfigDict) -> Objective:
    """Returns the objective after the warm-up, `config.objective`."""
    entry = OBJECTIVES[config.objective.name]
    loss, settings = entry.loss, entry.settings
    if _is_online_hardest(config):
        loss, settings = WARMUP["hardest"]
    objective = functools.partial(loss, **settings(config))
    if config.objective.teacher:
        objective = _with_soft_targets(objective, config.objective)
    if config.objective.queue:
        return objective
    return lambda features, queue, stats, rng: objective(features, None, stats, rng)


def warmup_objective(config: ml_collections.ConfigDict) -> Objective:
    """Returns the objective of the warm-up, `config.warmup`; it learns no temperature or bias."""
    loss, settings = WARMUP[config.warmup.objective]
    objective = functools.partial(loss, **settings(config))
    return lambda features, *rest: objective(dataclasses.replace(features, learned=None), *rest)


def fields_after_warmup(config: ml_collections.ConfigDict) -> set[str]:
    """Returns the dotted names of the fields on which the warm-up of a config does not depend."""
    after = {f"{part}.{field}" for part in ("objective", "fne") for field in config[part]}
    after |= {"data.matches", "data.matches_positive", "data.matches_negative"}
    after -= WARMUP_FIELDS
    return after - {"fne.margin"} if config.warmup.objective == "hardest" else after


def uses_keys(config: ml_collections.ConfigDict) -> bool:
    """Returns whether the objective after the warm-up reads momentum embeddings and the queue."""
    return OBJECTIVES[config.objective.name].uses_keys and not _is_online_hardest(config)


def _with_soft_targets(objective, settings):
    def with_soft_targets(features, *rest):
        loss, aux = objective(features, *rest)
        loss += soft_target_loss(
            features,
            cross_weight=settings.teacher_cross_weight,
            own_weight=settings.teacher_own_weight,
            temperature=settings.teacher_temperature,
        )
        return loss, aux

    return with_soft_targets


def uses_known(config: ml_collections.ConfigDict) -> bool:
    """Returns whether a run's steps take known matches or a teacher."""
    objective = config.objective
    return objective.oracle != NO_ORACLE or bool(config.data.matches or objective.teacher)


def takes_posterior(config: ml_collections.ConfigDict) -> bool:
    """Returns whether known matches are candidates, suspected by their probability."""
    return config.objective.name == "fne" and config.fne.posterior == LISTED


def _is_online_hardest(config):
    # As in VSE++: online embeddings are compared, and both sides learn.
    return config.objective.name == "hardest" and not config.objective.queue


def check_learned(objective: ml_collections.ConfigDict) -> None:
    """Raises UserError if a temperature that is learned begins where it may not go.

    One that is left open (0) is checked when it is known.
    """
    lowest, highest = learned_scalars.LOWEST_UNCLIPPED, learned_scalars.HIGHEST_TEMPERATURE
    if not objective.learn_temperature or not objective.temperature:
        return
    if not lowest <= objective.temperature <= highest:
        raise UserError(
            f"config.objective.temperature is {objective.temperature}; with learn_temperature "
            f"expected a number from {lowest} to {highest}"
        )


def check_matches(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if what a config says of known matches does not fit together."""
    objective, data = config.objective, config.data
    if data.matches_negative > data.matches_positive:
        raise UserError(
            f"config.data.matches_negative is {data.matches_negative}, more than "
            f"config.data.matches_positive={data.matches_positive}: pairs between the two are left "
            "out, so that it is at most the other; set both"
        )
    if objective.guide_margin is not None and not objective.teacher:
        raise UserError(
            f"config.objective.guide_margin is {objective.guide_margin}, but "
            "config.objective.teacher names no embeddings; name some, or leave it None"
        )
    if objective.guide_margin is not None and takes_posterior(config):
        raise UserError(
            f"config.objective.guide_margin is {objective.guide_margin}, which leaves candidates "
            f"out, and config.fne.posterior={LISTED} weighs them; leave one of them out"
        )
    if objective.oracle != NO_ORACLE and data.matches:
        raise UserError(
            f"config.data.matches is {data.matches!r}, and config.objective.oracle="
            f"{objective.oracle} takes the matches of the truth; leave one of them out"
        )
    if objective.oracle == POSITIVES and not OBJECTIVES[objective.name].takes_positives:
        able = [name for name, entry in OBJECTIVES.items() if entry.takes_positives]
        raise UserError(
            f"config.objective.oracle is {POSITIVES!r}, but config.objective.name="
            f"{objective.name} takes one positive an anchor; take oracle={DROP}, or one of the "
            f"objectives {', '.join(able)}"
        )

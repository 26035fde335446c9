"""Every training objective: its name, what it does, how a config builds it, what it reads.

To add an objective, add an entry to `OBJECTIVES` (and the fields that it reads to configs/base.py).
Training, the study and the table in docs/objectives.md take it from here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from fne_jax.errors import UserError
from fne_jax.objectives import learned_scalars
from fne_jax.objectives.contrastive import clip_loss, infonce_loss, sigmoid_loss
from fne_jax.objectives.features import Features
from fne_jax.objectives.fne_loss import fne_loss
from fne_jax.objectives.fne_settings import FNESettings, check_elimination
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.multi_positive import multi_positive_loss
from fne_jax.objectives.negative_mining import (
    hardest_negative,
    mined_loss,
    random_negative,
    semi_hard_negative,
)
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    update_similarity_statistics,
)
from fne_jax.objectives.triplet_loss import TripletAux, hardest_negative_triplet_loss

# What `config.objective.oracle` may be, of the matches that the training split's truth tells:
# nothing; they are left out of the negatives; they are positives beside the labelled ones.
NO_ORACLE, DROP, POSITIVES = ORACLES = ("none", "drop", "positives")

# Maps a PRNG key, the features of a batch, the queue and the updated statistics to the loss and,
# for losses that choose negatives, what they chose.
Objective = Callable[
    [jax.Array, Features, MemoryQueue | None, SimilarityStatistics],
    tuple[jax.Array, TripletAux | None],
]


@dataclasses.dataclass(frozen=True)
class Role:
    """How a config builds an objective for one phase of a run.

    Attributes:
      build: Maps a config to the objective.
      fields: Dotted names of the config fields that `build` reads.
    """

    build: Callable[[ml_collections.ConfigDict], Objective]
    fields: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A training objective.

    Attributes:
      name: The value of `config.objective.name` or `config.warmup.objective` that selects it.
      description: What becomes of the candidates, in a few words.
      source: The work that it comes from.
      main: How it is built for what follows the warm-up, or None if it cannot follow one.
      warmup: How it is built for the warm-up, or None if it cannot warm up.
      takes_positives: Whether an anchor may have several positives.
      uses_keys: Whether it compares anchors with momentum embeddings, after the warm-up.
    """

    name: str
    description: str
    source: str
    main: Role | None = None
    warmup: Role | None = None
    takes_positives: bool = False
    uses_keys: bool = True


def own_positives(features: Features) -> jax.Array:
    """Returns [batch, batch] bool, true for the image and the caption of one pair."""
    return jnp.eye(features.image_id.shape[0], dtype=bool)


def labelled_positives(features: Features) -> jax.Array:
    """Returns [batch, batch] bool, true for an image and the captions of that image."""
    return features.image_id[:, None] == features.image_id[None, :]


def known_positives(features: Features) -> jax.Array:
    """Returns [batch, batch] bool, true for an image, its captions, and those known to match."""
    labelled, matches = labelled_positives(features), features.matches
    return labelled if matches is None else labelled | matches.batch


def hardest_objective(rng, features, queue, stats, *, margin):
    """Computes `hardest_negative_triplet_loss` as an Objective."""
    del rng, queue, stats
    loss = hardest_negative_triplet_loss(
        features.image, features.text, margin=margin, same_image=features.excluded
    )
    return loss, None


def infonce_objective(rng, features, queue, stats, *, temperature):
    """Computes `infonce_loss` as an Objective."""
    del rng, stats
    loss = infonce_loss(
        features.image,
        features.text,
        features.momentum_image,
        features.momentum_text,
        features.image_id,
        queue,
        temperature=learned_scalars.temperature(temperature, features.learned),
        matches=features.matches,
    )
    return loss, None


def clip_objective(rng, features, queue, stats, *, temperature):
    """Computes `clip_loss` as an Objective."""
    del rng, queue, stats
    loss = clip_loss(
        features.image,
        features.text,
        temperature=learned_scalars.temperature(temperature, features.learned),
        same_image=features.excluded,
    )
    return loss, None


def multi_positive_objective(rng, features, queue, stats, *, temperature, positives_of):
    """Computes `multi_positive_loss` as an Objective."""
    del rng, queue, stats
    loss = multi_positive_loss(
        features.image,
        features.text,
        temperature=learned_scalars.temperature(temperature, features.learned),
        positives=positives_of(features),
        excluded=features.excluded,
    )
    return loss, None


def sigmoid_objective(rng, features, queue, stats, *, temperature, bias, positives_of):
    """Computes `sigmoid_loss` as an Objective."""
    del rng, queue, stats
    loss = sigmoid_loss(
        features.image,
        features.text,
        temperature=learned_scalars.temperature(temperature, features.learned),
        bias=learned_scalars.bias(bias, features.learned),
        same_image=features.excluded,
        positives=positives_of(features),
    )
    return loss, None


def _over_keys(objective, config):
    """Returns an objective whose candidates are those that `config.objective.queue` allows."""
    if config.objective.queue:
        return objective

    def within_the_batch(rng, features, queue, stats):
        del queue
        return objective(rng, features, None, stats)

    return within_the_batch


def _fne(config):
    settings = FNESettings.from_config(config.fne)
    return _over_keys(functools.partial(fne_loss, settings=settings), config)


def _mined(rule):
    def build(config):
        mined = functools.partial(
            mined_loss, rule=rule, margin=config.fne.margin, prior=config.fne.prior
        )
        return _over_keys(mined, config)

    return build


def _hardest_in_batch(config):
    return functools.partial(hardest_objective, margin=config.fne.margin)


def _hardest(config):
    # Within the batch, VSE++ compares online embeddings, and both sides learn.
    build = _mined(hardest_negative) if config.objective.queue else _hardest_in_batch
    return build(config)


def _infonce(config):
    return _over_keys(
        functools.partial(infonce_objective, temperature=config.objective.temperature), config
    )


def _at_fixed_temperature(objective, config):
    """Returns an objective of the warm-up: what is learned begins to be after it."""
    temperature = config.warmup.temperature

    def warm_up(rng, features, queue, stats):
        features = features.replace(learned=None)
        return objective(rng, features, queue, stats, temperature=temperature)

    return warm_up


def _infonce_warmup(config):
    return _at_fixed_temperature(infonce_objective, config)


def _clip_warmup(config):
    return _at_fixed_temperature(clip_objective, config)


def _clip(config):
    return functools.partial(clip_objective, temperature=config.objective.temperature)


def _multi_positive(config):
    return functools.partial(
        multi_positive_objective,
        temperature=config.objective.temperature,
        positives_of=known_positives if _matches_are_positives(config) else labelled_positives,
    )


def _sigmoid(config):
    return functools.partial(
        sigmoid_objective,
        temperature=config.objective.temperature,
        bias=config.objective.bias,
        positives_of=known_positives if _matches_are_positives(config) else own_positives,
    )


def uses_keys(config: ml_collections.ConfigDict) -> bool:
    """Returns whether the objective after the warm-up reads momentum embeddings and the queue."""
    online = config.objective.name == "hardest" and not config.objective.queue
    return OBJECTIVES[config.objective.name].uses_keys and not online


def uses_matches(config: ml_collections.ConfigDict) -> bool:
    """Returns whether a run's steps take a table of known matches."""
    return config.objective.oracle != NO_ORACLE or bool(config.data.matches)


def _matches_are_positives(config):
    return config.objective.oracle == POSITIVES or bool(config.data.matches)


_FNE_FIELDS = (
    "objective.queue",
    "fne.margin",
    "fne.tau",
    "fne.elimination_tau",
    "fne.prior",
    "fne.posterior_threshold",
    "fne.min_count",
    "fne.elimination",
    "fne.cut_down",
    "fne.monotone",
    "fne.key_chunk",
)
_MATCHES_FIELDS = ("objective.oracle", "data.matches")
_MINED_FIELDS = ("objective.queue", "fne.margin", "fne.prior")

OBJECTIVES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="fne",
            description="sampled by false negative elimination",
            source="Li et al. 2023",
            main=Role(_fne, _FNE_FIELDS),
        ),
        Entry(
            name="hardest",
            description="the most similar key; with `objective.queue=False` of the batch, online",
            source="VSE++",
            main=Role(_hardest, _MINED_FIELDS),
            warmup=Role(_hardest_in_batch, ("fne.margin",)),
        ),
        Entry(
            name="semi_hard",
            description="the most similar key that is less similar than the positive",
            source="FaceNet",
            main=Role(_mined(semi_hard_negative), _MINED_FIELDS),
        ),
        Entry(
            name="random",
            description="any key, all equally likely",
            source="Wu et al. 2017",
            main=Role(_mined(random_negative), _MINED_FIELDS),
        ),
        Entry(
            name="infonce",
            description="all keys, contrastively",
            source="MoCo, ALBEF",
            main=Role(_infonce, ("objective.queue", "objective.temperature")),
            warmup=Role(_infonce_warmup, ("warmup.temperature",)),
        ),
        Entry(
            name="sigmoid",
            description="all of the batch, each judged by itself",
            source="SigLIP",
            main=Role(_sigmoid, ("objective.temperature", "objective.bias", *_MATCHES_FIELDS)),
            takes_positives=True,
            uses_keys=False,
        ),
        Entry(
            name="clip",
            description="all of the batch, contrastively, both sides with gradient",
            source="CLIP",
            main=Role(_clip, ("objective.temperature",)),
            warmup=Role(_clip_warmup, ("warmup.temperature",)),
            uses_keys=False,
        ),
        Entry(
            name="multi_positive",
            description="as `clip`, each of several positives beside the negatives alone",
            source="SupCon",
            main=Role(_multi_positive, ("objective.temperature", *_MATCHES_FIELDS)),
            takes_positives=True,
            uses_keys=False,
        ),
    )
}

MAIN: dict[str, Role] = {e.name: e.main for e in OBJECTIVES.values() if e.main}
WARMUP: dict[str, Role] = {e.name: e.warmup for e in OBJECTIVES.values() if e.warmup}

# Parts of FNE switched off, for ablations: a name, and what changes in a config.
FNE_VARIANTS: dict[str, dict[str, str]] = {
    "fne_no_queue": {"objective.queue": "False"},
    "fne_no_elimination": {"fne.elimination": "none"},
    "fne_no_cutdown": {"fne.cut_down": "False"},
}


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the names by which a config selects objectives, before anything is built.

    Raises:
      UserError: if `config.objective.name`, `config.objective.oracle`, `config.warmup.objective` or
        `config.fne.elimination` is unknown, or the objective has no use for the oracle.
    """
    _check_name("objective.name", config.objective.name, MAIN)
    _check_name("objective.oracle", config.objective.oracle, ORACLES)
    _check_name("warmup.objective", config.warmup.objective, WARMUP)
    check_elimination(config.fne)
    check_oracle(config)
    check_learned(config.objective)


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


def check_oracle(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if the oracle gives positives to a loss of one, or there is a list too."""
    objective = config.objective
    if objective.oracle != NO_ORACLE and config.data.matches:
        raise UserError(
            f"config.data.matches is {config.data.matches!r}, and config.objective.oracle="
            f"{objective.oracle} takes the matches of the truth; leave one of them out"
        )
    if objective.oracle == POSITIVES and not OBJECTIVES[objective.name].takes_positives:
        able = [entry.name for entry in OBJECTIVES.values() if entry.takes_positives]
        raise UserError(
            f"config.objective.oracle is {POSITIVES!r}, but config.objective.name="
            f"{objective.name} takes one positive an anchor; take oracle={DROP}, or one of the "
            f"objectives {', '.join(able)}"
        )


def main_objective(config: ml_collections.ConfigDict) -> Objective:
    """Returns the objective after the warm-up, `config.objective`.

    Raises:
      UserError: if a name in the config is unknown.
    """
    check(config)
    return MAIN[config.objective.name].build(config)


def warmup_objective(config: ml_collections.ConfigDict) -> Objective:
    """Returns the objective of the warm-up, `config.warmup`.

    Raises:
      UserError: if a name in the config is unknown.
    """
    check(config)
    return WARMUP[config.warmup.objective].build(config)


def fields_after_warmup(config: ml_collections.ConfigDict) -> set[str]:
    """Returns the dotted names of the fields on which the warm-up of a config does not depend."""
    after = {f"objective.{field}" for field in config.objective} | {"data.matches"}
    after |= {field for role in MAIN.values() for field in role.fields}
    # Says what a checkpoint holds, of the warm-up too.
    after.discard("objective.learn_temperature")
    return after - set(WARMUP[config.warmup.objective].fields)


@dataclasses.dataclass(frozen=True)
class StatisticsRule:
    """How the batches of a run enter the similarity statistics.

    Attributes:
      ema_decay: The share of the old statistics that is kept at each step, in (0, 1].
      steps_per_epoch: The steps after which the statistics begin anew; None for never.
    """

    ema_decay: float
    steps_per_epoch: int | None

    def before_step(self, stats: SimilarityStatistics, step: jax.Array) -> SimilarityStatistics:
        """Returns the statistics that a step adds to: empty ones where an epoch begins.

        Args:
          stats: The statistics after the step before.
          step: [] int32 number of steps done.
        """
        if self.steps_per_epoch is None:
            return stats
        starts_epoch = step % self.steps_per_epoch == 0
        return jax.tree.map(lambda value: jnp.where(starts_epoch, 0.0, value), stats)

    def add(self, stats: SimilarityStatistics, features: Features) -> SimilarityStatistics:
        """Returns the statistics with a batch added."""
        return update_similarity_statistics(
            stats, features.image, features.text, features.excluded, ema_decay=self.ema_decay
        )


def statistics_rule(fne: ml_collections.ConfigDict, steps_per_epoch: int) -> StatisticsRule:
    """Returns how a run's batches enter the statistics.

    Args:
      fne: `config.fne`; with an `ema_decay` of 1 the statistics begin anew at each epoch, with less
        they are an exponential moving average.
      steps_per_epoch: Number of steps in an epoch.
    """
    return StatisticsRule(fne.ema_decay, steps_per_epoch if fne.ema_decay == 1 else None)


def _check_name(field, value, names):
    if value not in names:
        raise UserError(f"config.{field} is {value!r}; expected one of {', '.join(names)}")

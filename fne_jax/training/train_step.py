"""One step of training: a pure function of the state and a batch."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fne_jax.encoders import freezing
from fne_jax.encoders import inputs as encoder_inputs
from fne_jax.encoders.inputs import FEATURES, READ
from fne_jax.objectives.features import Features, RowSplit
from fne_jax.objectives.known_matches import KnownMatches, matches_of_step
from fne_jax.objectives.learned_scalars import BIAS_CHANGE, LEARNED, LOG_TEMPERATURE_FACTOR
from fne_jax.objectives.registry import Objective
from fne_jax.objectives.similarity_statistics import StatisticsRule
from fne_jax.objectives.teacher import Teacher
from fne_jax.training.encoder_passes import WholeBatch
from fne_jax.training.optimizer import updates_applied
from fne_jax.training.train_state import TrainState

# Scopes that name each part's operations in the compiled program; what lies neither in the encoders
# nor in the optimizer is the cost of the training strategy (fne_jax/planning).
FROZEN_ENCODERS = "frozen_encoders"
ONLINE_ENCODERS = "online_encoders"
MOMENTUM_ENCODERS = "momentum_encoders"
OPTIMIZER = "optimizer"
MOMENTUM_UPDATE = "momentum_update"
OBJECTIVE = "objective"
QUEUE = "queue"
# The fields of the state that a bad batch leaves as they were; the queue sees to itself.
_HELD = ("params", "momentum_params", "opt_state", "stats")


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What all steps of a run have in common.

    Attributes:
      module: The two towers, parts of which may be frozen.
      passes: How a batch goes through the encoders.
      momentum: The momentum m of the update m * momentum_params + (1 - m) * params.
      mask_same_image: Whether other captions of an image are no negatives within the batch.
      pixel_statistics: The mean and the standard deviation of each channel, in [0, 1].
      learning_rate: The learning rate by updates applied, for the log; the optimizer has its own.
      statistics_rule: How a batch enters the similarity statistics.
    """

    module: nn.Module
    passes: WholeBatch
    momentum: float
    mask_same_image: bool
    pixel_statistics: tuple[tuple[float, ...], tuple[float, ...]]
    learning_rate: optax.Schedule
    statistics_rule: StatisticsRule


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    known: KnownMatches | None = None,
    teacher: Teacher | None = None,
    *,
    settings: StepSettings,
    objective: Objective,
    use_keys: bool,
) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
    """Updates momentum encoders, statistics, weights and queue with one batch.

    A batch whose loss, gradient or momentum embeddings are not finite changes nothing but the step
    (and the statistics still start again with each epoch): the counts within the optimizer, which
    schedule the learning rate, stay behind with the rest.

    Args:
      state: The state before the step; the jitted form donates it.
      batch: `image` [batch, side, side, 3] uint8, `input_ids` and `attention_mask` [batch, length]
        int32, `image_id` and `pair_id` [batch] int32. What frozen parts make of image and caption
        may stand there already, as `image_features` (in place of `image`) and `text_features`.
      known: The table of the training split's known matches, on the devices; None uses none.
      teacher: A teacher's embeddings of that split likewise.
      settings: What all steps of the run have in common.
      objective: The loss in this phase of the run.
      use_keys: Whether the momentum encoders embed the batch, for the objective and the queue.
        Without it neither is there for the objective; the momentum encoders are updated all the
        same.

    Returns:
      The new state; scalars for the log, `applied` being 0 where the batch was not; and the
      negatives: empty, or [batch] int32 pair ids of the anchors and of their chosen and hardest
      candidates (`anchor`, `negative_i2t`, `negative_t2i`, `hardest_i2t`, `hardest_t2i`), -1 where
      there is none, or a slot of the queue was empty.

    References:
      Li et al., Your Negative May not Be True Negative, ACM MM 2023, arXiv 2308.04380, figure 2.
    """
    passes, layout, rule = settings.passes, settings.passes.layout, settings.statistics_rule
    # Here rather than with the batch, which may not be applied.
    state = state.replace(stats=rule.before_step(state.stats, state.step))
    sampling_rng, dropout_rng = jax.random.split(jax.random.fold_in(state.key, state.step))
    with jax.named_scope(MOMENTUM_UPDATE):
        momentum_params = optax.incremental_update(
            state.params, state.momentum_params, 1 - settings.momentum
        )
    # Ids and keys are replicated, as the queue is: each device scores its own anchors.
    image_id, pair_id = layout.replicated((batch["image_id"], batch["pair_id"]))
    same_image = jnp.eye(image_id.shape[0], dtype=bool)
    if settings.mask_same_image:
        same_image = image_id[:, None] == image_id[None, :]
    matches = _known_matches(known, teacher, pair_id, state.queue, layout)

    def encode(params, inputs, dropout_rng):
        params = freezing.merge(*params)
        statistics = settings.pixel_statistics
        return encoder_inputs.embed(state.apply_fn, params, inputs, statistics, dropout_rng)

    with jax.named_scope(FROZEN_ENCODERS):
        inputs = _frozen_features(state, batch, settings)
    base = freezing.split(settings.module, state.frozen_params)[freezing.Part.BASE]
    momentum = None, None
    if use_keys:
        with jax.named_scope(MOMENTUM_ENCODERS):
            momentum = passes.embed(encode, (momentum_params, base), inputs)
        with jax.named_scope(QUEUE):
            momentum = layout.replicated(momentum)

    @jax.named_scope(OBJECTIVE)
    def loss_fn(image, text, learned):
        split = RowSplit(layout.mesh.size, layout.rows)
        features = Features(
            image,
            text,
            *momentum,
            image_id,
            same_image,
            matches,
            learned or None,
            None if teacher is None else teacher.of_pairs(pair_id),
            split,
        )
        stats = rule.add(state.stats, features)
        loss, aux = objective(features, state.queue, stats, sampling_rng)
        return loss, (stats, aux)

    with jax.named_scope(ONLINE_ENCODERS):
        (loss, (stats, aux)), grads = passes.loss_and_gradients(
            encode, state.params, base, inputs, dropout_rng, loss_fn
        )
    with jax.named_scope(OPTIMIZER):
        gradient_norm = optax.tree.norm(grads)
        applied = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        for rows in momentum if use_keys else ():
            applied &= jnp.isfinite(rows).all()
    queue = state.queue
    if use_keys:
        with jax.named_scope(QUEUE):
            queue = queue.enqueue(*momentum, image_id, pair_id, where=applied)
    with jax.named_scope(OPTIMIZER):
        new = state.apply_gradients(
            grads=grads, momentum_params=momentum_params, stats=stats, queue=queue
        )
        new = new.replace(**{name: _held(applied, name, new, state) for name in _HELD})
    scalars = {
        "loss": loss,
        "applied": applied,
        "gradient_norm": gradient_norm,
        "learning_rate": jnp.float32(settings.learning_rate(updates_applied(state.opt_state))),
        **_statistics_scalars(stats),
        **_scalars(new, aux, image_id.shape[0]),
    }
    key_pair_id = jnp.concatenate([pair_id, state.queue.pair_id])
    return new, scalars, {} if aux is None else _negative_pairs(aux, key_pair_id)


def _frozen_features(state, batch, settings):
    """Returns what the encoders read of a batch, frozen parts having read what is theirs.

    They run once for the online and the momentum encoders, and have no dropout.
    """
    inputs = {
        name: batch[name]
        for name in (*READ["image"], *READ["text"], *FEATURES.values())
        if name in batch
    }

    def run(params, rows, rng):
        del rng
        statistics = settings.pixel_statistics
        return encoder_inputs.frozen_features(state.apply_fn, params, rows, statistics)

    for tower, name in FEATURES.items():
        if name not in inputs and freezing.is_frozen_below(settings.module, tower):
            own = {key: inputs[key] for key in READ[tower]}
            features = settings.passes.embed(run, {tower: state.frozen_params[tower]}, own)
            # Kept features come of a program of their own, and are to be the same to the bit.
            inputs[name] = jax.lax.optimization_barrier(features)
    if FEATURES["image"] in inputs:
        inputs.pop("image", None)
    return inputs


def _scalars(state, aux, batch_size):
    """Returns what the log gets of the state after a step, and of a triplet objective's choice."""
    filled = state.queue.image_id >= 0
    scalars = {
        "queue_filled": filled.mean(),
        "queue_age_steps": filled.sum(dtype=jnp.float32) / batch_size,
    }
    if aux is not None:
        scalars["fallback_fraction"] = aux.fallback_fraction
        scalars["sampled_posterior"] = aux.posterior
        scalars["hinge_active"] = aux.active_fraction
    if LEARNED in state.params:  # how far they are from the config's
        learned = state.params[LEARNED]
        scalars["temperature_factor"] = jnp.exp(learned[LOG_TEMPERATURE_FACTOR])
        scalars["bias_change"] = learned[BIAS_CHANGE]
    return scalars


def _statistics_scalars(stats):
    """Returns the mean, standard deviation and count of both distributions."""
    return {
        f"{name}_{field}": value
        for name, gaussian in (("positive", stats.positive), ("negative", stats.negative))
        for field, value in (
            ("mean", gaussian.mean),
            ("std", jnp.sqrt(gaussian.variance)),
            ("count", gaussian.count),
        )
    }


@jax.named_scope(OBJECTIVE)
def _known_matches(known, teacher, pair_id, queue, layout):
    matches = None if known is None else matches_of_step(known, pair_id, queue.pair_id)
    if teacher is not None:
        matches = teacher.left_out(matches, pair_id, queue.pair_id)
    if matches is None:
        return None
    # Each device looks up what concerns its own anchors.
    text, image = layout.rows((matches.queue_text, matches.queue_image))
    return matches.replace(queue_text=text, queue_image=image)


def _negative_pairs(aux, key_pair_id):
    keys = {
        "negative_i2t": jnp.where(aux.counts_i2t, aux.negative_i2t, -1),
        "negative_t2i": jnp.where(aux.counts_t2i, aux.negative_t2i, -1),
        "hardest_i2t": aux.hardest_i2t,
        "hardest_t2i": aux.hardest_t2i,
    }
    pairs = {name: jnp.where(key < 0, -1, key_pair_id[key]) for name, key in keys.items()}
    return {"anchor": key_pair_id[: aux.negative_i2t.shape[0]], **pairs}


def _held(applied, name, new, old):
    choose = functools.partial(jnp.where, applied)
    return jax.tree.map(choose, getattr(new, name), getattr(old, name))

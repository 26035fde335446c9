"""One step of training, a pure function of the state and a batch (design of the paper's Fig. 2)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fne_jax.encoders.pixels import normalize_pixels
from fne_jax.objectives.registry import Features, NextStatistics, Objective
from fne_jax.objectives.similarity_statistics import SimilarityStatistics
from fne_jax.objectives.triplet_loss import TripletAux
from fne_jax.parallel.sharding import StepLayout
from fne_jax.training.encoder_passes import EncoderPasses
from fne_jax.training.train_state import TrainState

# Scopes that name each part's operations in the compiled program; what lies in neither of these
# three is the cost of the training strategy (fne_jax/planning).
ONLINE_ENCODERS = "online_encoders"
MOMENTUM_ENCODERS = "momentum_encoders"
OPTIMIZER = "optimizer"
MOMENTUM_UPDATE = "momentum_update"
OBJECTIVE = "objective"
MEMORY = "memory"


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    passes: EncoderPasses,
    layout: StepLayout,
    objective: Objective,
    next_statistics: NextStatistics,
    write_queue: bool,
    momentum: float,
    mask_same_image: bool,
    image_mean: tuple[float, ...],
    image_std: tuple[float, ...],
    learning_rate: optax.Schedule,
) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
    """Updates momentum encoders, statistics, weights and memory with one batch.

    A batch whose loss, gradient or momentum embeddings are not finite changes nothing but the step:
    the counts within the optimizer, which schedule the learning rate, stay behind with the rest.

    Args:
      state: donated by the jitted form.
      batch: `image` [batch, side, side, 3] uint8, `input_ids` and `attention_mask` [batch, length]
        int32, `image_id` and `pair_id` [batch] int32.
      passes: how the batch goes through the encoders.
      layout: of the arrays over the devices.
      objective: the loss of this phase of the run.
      next_statistics: adds the batch to the similarity statistics.
      write_queue: whether the batch's momentum embeddings enter the memory.
      momentum: of the momentum encoders, which move before they encode.
      mask_same_image: whether other captions of an image are no negatives within the batch.
      image_mean: of the pixels in [0, 1], by channel.
      image_std: of the pixels in [0, 1], by channel.
      learning_rate: for the log; the optimizer has its own.

    Returns:
      The new state, scalars (`applied` is 0 where the batch was not), and the negatives: empty, or
      [batch] int32 pair ids of the anchors,
      of the chosen and of the hardest candidates (`anchor`, `negative_i2t`, `negative_t2i`,
      `hardest_i2t`, `hardest_t2i`), -1 where the memory's slot was empty.
    """
    rng = jax.random.fold_in(state.key, state.step)
    sampling_rng, dropout_rng = jax.random.split(rng)
    with jax.named_scope(MOMENTUM_UPDATE):
        momentum_params = optax.incremental_update(
            state.params, state.momentum_params, 1 - momentum
        )
    # Ids and keys are replicated, as the queue is: each device scores its own anchors.
    image_id, pair_id = layout.replicated((batch["image_id"], batch["pair_id"]))
    same_image = jnp.eye(image_id.shape[0], dtype=bool)
    if mask_same_image:
        same_image = image_id[:, None] == image_id[None, :]

    def encode(params, inputs, dropout_rng):
        pixels = normalize_pixels(inputs["image"], image_mean, image_std)
        embeddings = state.apply_fn(
            {"params": layout.replicated_parameters(params)},
            pixels,
            inputs["input_ids"],
            inputs["attention_mask"],
            deterministic=dropout_rng is None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )
        return layout.rows(embeddings)

    inputs = {k: batch[k] for k in ("image", "input_ids", "attention_mask")}
    with jax.named_scope(MOMENTUM_ENCODERS):
        momentum_embeddings = passes.embed(encode, momentum_params, inputs)
    with jax.named_scope(MEMORY):
        momentum_image, momentum_text = layout.replicated(momentum_embeddings)

    @jax.named_scope(OBJECTIVE)
    def loss_fn(image, text):
        features = Features(image, text, momentum_image, momentum_text, image_id, same_image)
        stats = next_statistics(state.stats, state.step, features)
        loss, aux = objective(sampling_rng, features, state.queue, stats)
        return loss, (stats, aux)

    with jax.named_scope(ONLINE_ENCODERS):
        (loss, (stats, aux)), grads = passes.loss_and_gradients(
            encode, state.params, inputs, dropout_rng, loss_fn
        )
    with jax.named_scope(OPTIMIZER):
        gradient_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        finite &= jnp.isfinite(momentum_image).all() & jnp.isfinite(momentum_text).all()
    queue = state.queue
    if write_queue:
        with jax.named_scope(MEMORY):
            rows = momentum_image, momentum_text, image_id, pair_id
            queue = queue.enqueue(*rows, where=finite)
    scalars = {
        "loss": loss,
        "applied": finite,
        "gradient_norm": gradient_norm,
        "learning_rate": learning_rate(state.step),
        **statistics_scalars(stats),
        "queue_filled": (queue.image_id >= 0).mean(),
        "queue_age_steps": (queue.image_id >= 0).sum() / image_id.shape[0],
    }
    negatives = {}
    if aux is not None:
        scalars |= {
            "fallback_fraction": aux.fallback_fraction,
            "sampled_posterior": aux.posterior,
            "hinge_active": aux.active_fraction,
        }
        negatives = _negative_pairs(aux, jnp.concatenate([pair_id, state.queue.pair_id]))
    with jax.named_scope(OPTIMIZER):
        new = state.apply_gradients(
            grads=grads, momentum_params=momentum_params, stats=stats, queue=queue
        )
        held = {
            name: jax.tree.map(functools.partial(jnp.where, finite), getattr(new, name), value)
            for name, value in (
                ("params", state.params),
                ("momentum_params", state.momentum_params),
                ("opt_state", state.opt_state),
                ("stats", state.stats),
            )
        }
    return new.replace(**held), scalars, negatives


def statistics_scalars(stats: SimilarityStatistics) -> dict[str, Any]:
    """Returns mean, standard deviation and count of both distributions."""
    return {
        f"{name}_{field}": value
        for name, gaussian in (("positive", stats.positive), ("negative", stats.negative))
        for field, value in (
            ("mean", gaussian.mean),
            ("std", jnp.sqrt(gaussian.variance)),
            ("count", gaussian.count),
        )
    }


def _negative_pairs(aux: TripletAux, key_pair_id: jax.Array) -> dict[str, jax.Array]:
    names = ("negative_i2t", "negative_t2i", "hardest_i2t", "hardest_t2i")
    pairs = {name: key_pair_id[getattr(aux, name)] for name in names}
    return {"anchor": key_pair_id[: aux.negative_i2t.shape[0]], **pairs}

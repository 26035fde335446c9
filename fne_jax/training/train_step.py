"""One step of training, a pure function of the state and a batch (design of the paper's Fig. 2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fne_jax.objectives.similarity_statistics import SimilarityStatistics
from fne_jax.objectives.triplet_loss import TripletAux
from fne_jax.training.objective import Features, NextStatistics, Objective
from fne_jax.training.train_state import TrainState


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    augment: Callable[[dict[str, jax.Array]], jax.Array],
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
      augment: of the batch, the [batch, size, size, 3] uint8 pixels to train on: `given_pixels`, or
        `device_augmentation.augment_batch`, which reads further arrays of the batch.
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
    momentum_params = optax.incremental_update(state.params, state.momentum_params, 1 - momentum)
    pixels = normalize_pixels(augment(batch), image_mean, image_std)
    tokens = batch["input_ids"], batch["attention_mask"]
    momentum_image, momentum_text = state.apply_fn({"params": momentum_params}, pixels, *tokens)
    image_id = batch["image_id"]
    same_image = jnp.eye(image_id.shape[0], dtype=bool)
    if mask_same_image:
        same_image = image_id[:, None] == image_id[None, :]

    def loss_fn(params):
        image, text = state.apply_fn(
            {"params": params},
            pixels,
            *tokens,
            deterministic=False,
            rngs={"dropout": dropout_rng},
        )
        features = Features(image, text, momentum_image, momentum_text, image_id, same_image)
        stats = next_statistics(state.stats, state.step, features)
        loss, aux = objective(sampling_rng, features, state.queue, stats)
        return loss, (stats, aux)

    (loss, (stats, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    gradient_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    finite &= jnp.isfinite(momentum_image).all() & jnp.isfinite(momentum_text).all()
    queue = state.queue
    if write_queue:
        rows = momentum_image, momentum_text, image_id, batch["pair_id"]
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
        negatives = _negative_pairs(aux, jnp.concatenate([batch["pair_id"], state.queue.pair_id]))
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


def given_pixels(batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the batch's pictures as they came; the host augmented them."""
    return batch["image"]


def normalize_pixels(
    image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """Returns float32 pixels of mean 0 and deviation 1: [batch, side, side, 3] uint8 in."""
    mean, std = (jnp.array(values).reshape(1, 1, 1, 3) for values in (mean, std))
    return (image.astype(jnp.float32) / 255.0 - mean) / std


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

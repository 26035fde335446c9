"""Everything that training depends on, in one pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from fne_jax.encoders.dual_encoder import DualEncoder
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.similarity_statistics import SimilarityStatistics


class TrainState(train_state.TrainState):
    """flax's TrainState and what FNE adds.

    Attributes:
      momentum_params: the momentum encoders, shaped as `params`.
      queue: the memory of momentum embeddings.
      stats: the similarity statistics of this epoch.
      key: [] PRNG key; each step folds its number and a purpose into it.
    """

    momentum_params: Any
    queue: MemoryQueue
    stats: SimilarityStatistics
    key: jax.Array


def create_train_state(
    rng: jax.Array,
    module: DualEncoder,
    tx: optax.GradientTransformation,
    *,
    image_size: int,
    text_length: int,
    queue_size: int,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      rng: typed PRNG key.
      module: the two towers.
      tx: the optimizer.
      image_size: pixels of a side.
      text_length: tokens of a caption.
      queue_size: slots of the memory.
    """
    params_rng, queue_rng, key = jax.random.split(rng, 3)
    pixels = jnp.zeros((1, image_size, image_size, 3))
    tokens = jnp.zeros((1, text_length), jnp.int32)

    (image_emb, _), variables = module.init_with_output(params_rng, pixels, tokens, tokens + 1)
    params = variables["params"]
    return TrainState(
        # An array rather than flax's 0, so that the first and later steps compile alike.
        step=jnp.zeros((), jnp.int32),
        apply_fn=module.apply,
        params=params,
        tx=tx,
        opt_state=tx.init(params),
        # A copy: a donated state must not hold one buffer twice.
        momentum_params=jax.tree.map(jnp.copy, params),
        queue=MemoryQueue.create(queue_rng, queue_size, image_emb.shape[-1]),
        stats=SimilarityStatistics.create(),
        key=key,
    )

"""Everything that training depends on, in one pytree, and how it begins."""

from __future__ import annotations

import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax.training import train_state

from fne_jax.encoders import towers
from fne_jax.errors import UserError
from fne_jax.model.model import Model, initial_params, restore_model
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.similarity_statistics import SimilarityStatistics
from fne_jax.parallel import sharding
from fne_jax.training.optimizer import build_optimizer

# The fields that a checkpoint holds; the others (`apply_fn`, `tx`) follow from the config.
STORED_FIELDS = ("step", "params", "opt_state", "momentum_params", "queue", "stats", "key")
_log = logging.getLogger(__name__)


class TrainState(train_state.TrainState):
    """flax's TrainState and what FNE adds.

    Attributes:
      momentum_params: The parameters of the momentum encoders, shaped as `params`.
      queue: The queue of momentum embeddings.
      stats: The similarity statistics.
      key: [] PRNG key; each step folds its number and a purpose into it.
    """

    momentum_params: Any
    queue: MemoryQueue
    stats: SimilarityStatistics
    key: jax.Array

    def stored(self) -> dict[str, Any]:
        """Returns the fields that a checkpoint holds, by name."""
        return {name: getattr(self, name) for name in STORED_FIELDS}


def create_train_state(
    rng: jax.Array, *, model: Model, apply_fn: Callable, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step.

    Args:
      rng: A typed PRNG key.
      model: The model to be trained; its parameters, if it has any, are not used.
      apply_fn: The function of parameters and inputs that training calls.
      tx: The optimizer.
    """
    params_rng, queue_rng, key = jax.random.split(rng, 3)
    params, dim = initial_params(model.module, model.config, params_rng)
    return TrainState(
        # An array rather than flax's 0, so that the first and later steps compile alike.
        step=jnp.zeros((), jnp.int32),
        apply_fn=apply_fn,
        params=params,
        tx=tx,
        opt_state=tx.init(params),
        # A copy: a donated state must not hold one buffer twice.
        momentum_params=jax.tree.map(jnp.copy, params),
        queue=MemoryQueue.create(queue_rng, model.config.queue_size, dim),
        stats=SimilarityStatistics.create(),
        key=key,
    )


def abstract_state(model: Model, learning_rate: optax.Schedule) -> TrainState:
    """Returns the shapes, dtypes and shardings of a run's state; nothing is allocated.

    Args:
      model: The model to be trained.
      learning_rate: The learning rate as a function of the updates already applied.
    """
    config = model.config
    module = model.module.clone(text_pooling=config.encoder.text.training_pooling)
    tx = build_optimizer(config.optimizer, learning_rate)
    create = functools.partial(create_train_state, model=model, apply_fn=module.apply, tx=tx)
    return sharding.abstract_on(model.mesh, jax.eval_shape(create, jax.random.key(config.seed)))


def initial_state(model: Model, like: TrainState) -> TrainState:
    """Returns the state before the first step, created on the devices where it stays.

    Args:
      model: The model to be trained.
      like: What `abstract_state` returned; programs compiled for it take this state.
    """
    create = functools.partial(create_train_state, model=model, apply_fn=like.apply_fn, tx=like.tx)
    shardings = sharding.state_shardings(model.mesh, like)
    return jax.jit(create, out_shardings=shardings)(jax.random.key(model.config.seed))


def with_first_weights(state: TrainState, config: ml_collections.ConfigDict) -> TrainState:
    """Returns a new run's state with the weights that its config begins with.

    They are another run's (`config.init_from`), or those of pretrained towers; a tower without
    either keeps its random weights.

    Raises:
      UserError: if the weights do not fit.
    """
    if config.init_from:
        return _with_weights_of(state, pathlib.Path(config.init_from))
    if any(config.encoder[tower].pretrained for tower in towers.TOWERS):
        return _with_pretrained_towers(state, config.encoder)
    return state


def _with_pretrained_towers(state, encoder):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    loaded = towers.pretrained_params(encoder, state.params)
    placed = jax.tree.map(sharding.place, loaded, shardings)

    # Computed rather than placed: a donated state must neither hold a buffer twice nor share one
    # with the arrays that were read.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
    return state.replace(params=copy(placed), momentum_params=copy(placed))


def _with_weights_of(state, workdir):
    """Returns the state with both encoders' weights from another run's best checkpoint."""
    other = restore_model(workdir, "best", mesh=state.step.sharding.mesh)
    ours, theirs = _shapes(state.params), _shapes(other.params)
    if ours != theirs:
        different = [
            f"{name}: {theirs.get(name)} there, {ours.get(name)} here"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        raise UserError(
            f"config.init_from={workdir}: the weights do not fit:\n  " + "\n  ".join(different)
        )
    _log.info("weights: from step %d of %s", other.step, workdir)
    return state.replace(params=other.params, momentum_params=other.momentum_params)


def _shapes(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

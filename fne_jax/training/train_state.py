"""Everything that training depends on, in one pytree, and how it begins."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from fne_jax import files
from fne_jax.configuration import flatten
from fne_jax.encoders import freezing, towers
from fne_jax.encoders.dual_encoder import CHECKPOINT, FIRST_AND_MEAN
from fne_jax.encoders.hub_files import run_folder
from fne_jax.encoders.low_rank import FACTORS
from fne_jax.errors import UserError
from fne_jax.model import checkpoints
from fne_jax.model.model import Model, abstract_fields, initial_params, stored_model
from fne_jax.objectives.learned_scalars import towers_of
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.similarity_statistics import SimilarityStatistics
from fne_jax.parallel import sharding
from fne_jax.training.optimizer import build_optimizer

# What an encoder is given, as far as other values would be read by the same weights.
_READING = (
    "image_mean",
    "image_std",
    "data.cleaning",
    "data.max_words",
    "data.prompt",
    "data.text_length",
)
# Fields of modules that say how something is computed or trained, and not what.
_HOW = ("dtype", "dropout", "attention", "mesh", "scan_layers", "remat")
_HOW += ("frozen_layers", "lora_rank", "parent", "name")
_log = logging.getLogger(__name__)


class TrainState(train_state.TrainState):
    """flax's TrainState, whose `params` are those that are trained, and what FNE adds.

    Attributes:
      frozen_params: The parameters that are not trained, of online and momentum encoders alike.
      momentum_params: The parameters of the momentum encoders, shaped as `params`.
      queue: The queue of momentum embeddings.
      stats: The similarity statistics.
      key: [] PRNG key; each step folds its number and a purpose into it.
    """

    frozen_params: Any
    momentum_params: Any
    queue: MemoryQueue
    stats: SimilarityStatistics
    key: jax.Array

    @property
    def all_params(self) -> dict[str, Any]:
        """All parameters of the online encoders."""
        return freezing.merge(self.params, self.frozen_params)

    def stored(self) -> dict[str, Any]:
        """Returns the fields that a checkpoint holds, by name; the config gives the others."""
        fields = dataclasses.fields(self)
        return {
            f.name: getattr(self, f.name) for f in fields if f.metadata.get("pytree_node", True)
        }


def _created(rng, weights, model, apply_fn, tx):
    """Returns the state before the first step, see `initial_state`."""
    params_rng, queue_rng, key = jax.random.split(rng, 3)
    params, dim = initial_params(model.module, model.config, params_rng)
    split = functools.partial(freezing.trained_and_frozen, model.module)
    params, frozen_params = split(freezing.merge(params, weights.get("params", {})))
    momentum_params, _ = split(weights.get("momentum_params", {}))
    # A copy: a donated state must not hold one buffer twice.
    momentum_params = freezing.merge(jax.tree.map(jnp.copy, params), momentum_params)
    return TrainState(
        # An array rather than flax's 0, so that the first and later steps compile alike.
        step=jnp.zeros((), jnp.int32),
        apply_fn=apply_fn,
        params=params,
        frozen_params=frozen_params,
        tx=tx,
        opt_state=tx.init(params),
        momentum_params=momentum_params,
        queue=MemoryQueue.create(queue_rng, model.config.queue_size, dim),
        stats=SimilarityStatistics.create(),
        key=key,
    )


def abstract_state(model: Model, learning_rate: optax.Schedule) -> TrainState:
    """Returns the shapes, dtypes and shardings of a run's state; nothing is allocated.

    Raises UserError if captions are pooled to one width in training and to another in evaluation.
    """
    config = model.config
    pooling, training = config.encoder.text.pooling, config.encoder.text.training_pooling
    for alone in (CHECKPOINT, FIRST_AND_MEAN):  # the others read the same states, of one width
        if (training == alone) != (pooling == alone):
            raise UserError(
                f"config.encoder.text.training_pooling is {training!r} and its pooling "
                f"{pooling!r}, which are different embeddings; expected {alone!r} as both or as "
                "neither"
            )
    module = model.module.clone(text_pooling=training)
    temperature = config.objective.temperature if config.objective.learn_temperature else None
    tx = build_optimizer(config.optimizer, learning_rate, module, temperature)
    create = functools.partial(_created, model=model, apply_fn=module.apply, tx=tx)
    state = jax.eval_shape(create, jax.random.key(config.seed), {})
    return sharding.abstract_on(model.mesh, state)


def initial_state(
    model: Model, like: TrainState, weights: Mapping[str, Mapping[str, Any]] | None = None
) -> TrainState:
    """Returns the state before the first step, created on the devices where it stays.

    It takes programs that were compiled for `like`, what `abstract_state` returned. It begins with
    `weights`: `params` and `momentum_params` of both towers, or `params` of some parts of the
    model, frozen ones among them; the rest of `params` is random, and of `momentum_params` a copy
    of it. They are donated: the state takes their memory over. The model's own parameters are not
    used.
    """
    create = functools.partial(_created, model=model, apply_fn=like.apply_fn, tx=like.tx)
    shardings = sharding.state_shardings(model.mesh, like)
    create = jax.jit(create, out_shardings=shardings, donate_argnums=1)
    return create(jax.random.key(model.config.seed), weights or {})


def first_state(model: Model, like: TrainState) -> TrainState:
    """Returns the state before the first step with the weights that the config begins with.

    They are another run's (`config.init_from`), or those of pretrained towers; a tower without
    either has random weights. The devices never hold more than the state itself. Raises UserError
    if the weights are not there, or do not fit.
    """
    config, weights = model.config, None
    if config.init_from:
        workdir, step, abstract = find_source_run(model, like)
        with checkpoints.reader(workdir) as manager:
            weights, _ = checkpoints.read(manager, step, abstract)
        frozen = weights.pop("frozen_params")
        weights = {n: freezing.merge(towers_of(own), frozen) for n, own in weights.items()}
        _log.info("weights: from step %d of %s", step, workdir)
    elif any(config.encoder[tower].pretrained for tower in towers.TOWERS):
        weights = {"params": _pretrained_towers(config.encoder, model.mesh)}
    return initial_state(model, like, weights)


def find_source_run(
    model: Model, like: TrainState
) -> tuple[pathlib.Path, int, dict[str, Any]] | None:
    """Returns the run that `config.init_from` names, or None without any; reads no arrays.

    That is its folder, the step of its best checkpoint, and the abstract weights of both encoders
    and what is frozen, on the new run's mesh.

    Warns if that run was given images or captions otherwise. Raises UserError if there is no such
    run, it has no checkpoint, or its weights do not fit, by their shapes or because they were
    another function's.
    """
    config = model.config
    if not config.init_from:
        return None
    with files.as_user_error(f"config.init_from={config.init_from}", errors=UserError):
        workdir = run_folder(config.init_from)
        other = stored_model(workdir, mesh=like.step.sharding.mesh)
        with checkpoints.reader(workdir) as manager:
            step = checkpoints.find_step(manager, "best")
    fields = abstract_fields(other)
    ours = _shapes(towers_of(like.all_params))
    theirs = _shapes(freezing.merge(towers_of(fields["params"]), fields["frozen_params"]))
    # Low-rank changes start at nothing where the other run has none.
    added = [n for n in ours.keys() - theirs.keys() if any(factor in n for factor in FACTORS)]
    ours = {name: shape for name, shape in ours.items() if name not in added}
    different = _differences(theirs | _function(other.module), ours | _function(model.module))
    if different:
        raise UserError(
            f"config.init_from={workdir}: the weights do not fit:\n  " + "\n  ".join(different)
        )
    read = [
        {name: json.dumps(flatten(of)[name]) for name in _READING} for of in (other.config, config)
    ]
    if different := _differences(*read):
        _log.warning(
            "config.init_from=%s: its weights were trained with %s", workdir, "; ".join(different)
        )
    weights = {name: fields[name] for name in ("params", "momentum_params", "frozen_params")}
    return workdir, step, sharding.abstract_on(other.mesh, weights)


def _pretrained_towers(encoder, mesh):
    """Returns the params of the pretrained towers, placed as a state's are."""
    loaded = towers.pretrained_params(encoder, {})
    shardings = jax.tree.map(lambda leaf: sharding.parameter_sharding(mesh, leaf.shape), loaded)
    # Copied: what is donated must not share a buffer with the arrays that were read.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
    return copy(jax.tree.map(sharding.place, loaded, shardings))


def _differences(theirs, ours):
    """Returns what differs between two mappings, a line each."""
    return [
        f"{name}: {theirs.get(name)} there, {ours.get(name)} here"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _function(module, name="module"):
    """Returns by name what a module computes with its parameters, such as `module.image.heads`."""
    found = {name: type(module).__name__}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name, None)
        if isinstance(value, nn.Module) and field.name != "parent":
            found |= _function(value, f"{name}.{field.name}")
        elif field.name not in _HOW:
            found[f"{name}.{field.name}"] = value
    return found


def _shapes(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

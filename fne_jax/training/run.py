"""The parts of a run that its config and workdir determine: tokenizer, model, state, weights."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import transformers

from fne_jax import configuration
from fne_jax.data import captions as caption_lib
from fne_jax.data.pairs import PairDataset
from fne_jax.encoders import towers
from fne_jax.encoders.dual_encoder import DualEncoder
from fne_jax.errors import UserError
from fne_jax.model.embedder import Embedder
from fne_jax.parallel import sharding
from fne_jax.training import checkpointing
from fne_jax.training.optimizer import build_optimizer
from fne_jax.training.train_state import TrainState, create_train_state

TOKENIZER_DIRECTORY = "tokenizer"
_log = logging.getLogger(__name__)


def clean_captions(config: ml_collections.ConfigDict, captions: Sequence[str]) -> list[str]:
    """Returns captions as the tokenizer gets them."""
    return [caption_lib.clean_caption(text, config.data.max_words) for text in captions]


def tokenize_captions(
    config: ml_collections.ConfigDict,
    tokenizer: transformers.PreTrainedTokenizerBase,
    captions: Sequence[str],
    length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and masks of raw captions, both [captions, length] int32."""
    return caption_lib.tokenize(tokenizer, clean_captions(config, captions), length)


def run_tokenizer(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, train: PairDataset
) -> transformers.PreTrainedTokenizerBase:
    """Returns the run's tokenizer, stored in its workdir from before the first step on.

    It is the stored one if the run has one; else, if it is to be fitted, that of the run whose
    weights this run begins with, or a new one; else the one that the config names.
    """
    folder = workdir / TOKENIZER_DIRECTORY
    if folder.is_dir():
        return caption_lib.load_tokenizer(str(folder))
    if config.data.tokenizer != caption_lib.TRAIN:
        tokenizer = caption_lib.load_tokenizer(config.data.tokenizer)
    elif config.init_from:
        tokenizer = stored_tokenizer(pathlib.Path(config.init_from))
    else:
        tokenizer = caption_lib.fit_tokenizer(
            clean_captions(config, train.captions), config.data.vocab_size
        )
    if jax.process_index() == 0:
        caption_lib.save_tokenizer(tokenizer, folder)
    return tokenizer


def stored_tokenizer(workdir: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Returns the tokenizer of a run.

    Raises:
      UserError: if there is none.
    """
    folder = workdir / TOKENIZER_DIRECTORY
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: {workdir} is not the workdir of a run")
    return caption_lib.load_tokenizer(str(folder))


def build_module(
    config: ml_collections.ConfigDict,
    architectures: Mapping[str, Mapping[str, Any]],
    vocab_size: int,
) -> DualEncoder:
    """Returns the model of a run.

    Args:
      config: of the run.
      architectures: of `towers.read_architectures`.
      vocab_size: number of the tokenizer's ids.

    Raises:
      UserError: if sources, sizes, tokenizer and length of captions do not fit together.
    """
    module = towers.build_dual_encoder(config.encoder, vocab_size, architectures)
    for part in ("data", "evaluation"):
        if config[part].text_length > module.text.max_length:
            raise UserError(
                f"config.{part}.text_length is {config[part].text_length}, more than the "
                f"{module.text.max_length} positions of the text encoder"
            )
    return module


def with_pretrained_towers(state: TrainState, encoder: ml_collections.ConfigDict) -> TrainState:
    """Returns a state whose encoders, momentum encoders too, start from the config's sources."""
    if not any(encoder[tower].pretrained for tower in towers.TOWERS):
        return state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    loaded = towers.pretrained_params(encoder, state.params)
    placed = jax.tree.map(sharding.place, loaded, shardings)

    # Computed rather than placed: a donated state must neither hold a buffer twice nor share one
    # with the arrays that were read.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
    return state.replace(params=copy(placed), momentum_params=copy(placed))


def initial_state(
    config: ml_collections.ConfigDict,
    module: DualEncoder,
    mesh: jax.sharding.Mesh,
    learning_rate: optax.Schedule,
) -> TrainState:
    """Returns the state before the first step, created on the devices where it stays."""
    create = _creation(config, module, learning_rate)
    rng = jax.random.key(config.seed)
    shardings = sharding.state_shardings(mesh, jax.eval_shape(create, rng))
    return jax.jit(create, out_shardings=shardings)(rng)


def abstract_state(
    config: ml_collections.ConfigDict,
    module: DualEncoder,
    mesh: jax.sharding.Mesh,
    learning_rate: optax.Schedule,
) -> TrainState:
    """Returns `initial_state`'s shapes, dtypes and shardings; nothing is allocated."""
    state = jax.eval_shape(_creation(config, module, learning_rate), jax.random.key(config.seed))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        sharding.state_shardings(mesh, state),
    )


def _creation(config, module, learning_rate):
    """Returns a function from a key to the state before the first step."""
    return functools.partial(
        create_train_state,
        module=module.clone(text_pooling=config.encoder.text.training_pooling),
        tx=build_optimizer(config.optimizer, learning_rate),
        image_size=config.encoder.image.image_size,
        text_length=config.data.text_length,
        queue_size=config.queue_size,
    )


def build_embedder(
    config: ml_collections.ConfigDict,
    module: DualEncoder,
    mesh: jax.sharding.Mesh,
    before_batch: Callable[[], None] = lambda: None,
) -> Embedder:
    """Returns what embeds splits as the config says; for `before_batch` see `Embedder`."""
    return Embedder(
        module,
        mesh,
        batch_size=config.evaluation.batch_size,
        image_size=config.encoder.image.image_size,
        image_mean=config.image_mean,
        image_std=config.image_std,
        before_batch=before_batch,
    )


@dataclasses.dataclass(frozen=True)
class RestoredRun:
    """A model with what belongs to it, ready to embed.

    Attributes:
      config: of the run, or that the model was built from.
      tokenizer: of the captions.
      module: the model.
      params: its parameters, on `mesh`.
      step: updates that they have had.
      mesh: of all devices.
      state: the whole train state; None for pretrained towers as they come.
    """

    config: ml_collections.ConfigDict
    tokenizer: transformers.PreTrainedTokenizerBase
    module: DualEncoder
    params: Any
    step: int
    mesh: jax.sharding.Mesh
    state: TrainState | None = None


def restore_run(
    workdir: pathlib.Path, checkpoint: str, mesh: jax.sharding.Mesh | None = None
) -> RestoredRun:
    """Returns a run with the weights of `best`, `latest` or a step, on the devices that are here.

    Args:
      workdir: of the run.
      checkpoint: `best`, `latest` or a step.
      mesh: whose shardings the state takes; None for a whole copy on each device.

    Raises:
      UserError: if the folder is not a run's, or the checkpoint is not there or damaged.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give the --workdir of a run")
    config = configuration.read_config(workdir)
    manager = checkpointing.checkpoint_manager(workdir, config.checkpoint, read_only=True)
    step = checkpointing.find_step(manager, checkpoint)
    tokenizer = stored_tokenizer(workdir)
    architectures = towers.read_architectures(config.encoder, workdir)
    module = build_module(config, architectures, len(tokenizer))
    mesh = sharding.create_mesh() if mesh is None else mesh
    # Only the structure of the optimizer's state matters here, not its learning rate.
    like = abstract_state(config, module, mesh, optax.constant_schedule(0.0))
    state, _ = checkpointing.restore(manager, step, like)
    manager.close()
    return RestoredRun(config, tokenizer, module, state.params, step, mesh, state)


def pretrained_run(config: ml_collections.ConfigDict) -> RestoredRun:
    """Returns the pretrained towers of a config as they come, without any training.

    Raises:
      UserError: if anything of them would be random.
    """
    architectures = towers.read_architectures(config.encoder)
    config = towers.with_model_defaults(config, architectures)
    for tower in towers.TOWERS:
        if not config.encoder[tower].pretrained:
            raise UserError(
                f"config.encoder.{tower}.pretrained is empty: from random weights there is nothing "
                "to score without training"
            )
    if config.encoder.projection_dim:
        raise UserError(
            f"config.encoder.projection_dim is {config.encoder.projection_dim}: a projection "
            "starts from random weights, so there is nothing to score without training"
        )
    tokenizer = caption_lib.load_tokenizer(config.data.tokenizer)
    module = build_module(config, architectures, len(tokenizer))
    mesh = sharding.create_mesh()
    params = towers.pretrained_params(config.encoder, {})
    params = jax.device_put(params, sharding.replicated(mesh))
    return RestoredRun(config, tokenizer, module, params, 0, mesh)


def with_weights_of(state: TrainState, workdir: pathlib.Path) -> TrainState:
    """Returns the state with both encoders' weights from another run's best checkpoint.

    They are read into the shardings of the state's mesh.

    Raises:
      UserError: if that run's weights have other names or shapes.
    """
    other = restore_run(workdir, "best", state.step.sharding.mesh).state
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
    _log.info("weights: from step %d of %s", int(other.step), workdir)
    return state.replace(params=other.params, momentum_params=other.momentum_params)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

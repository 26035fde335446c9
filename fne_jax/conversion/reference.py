"""The checkpoint that the authors' PyTorch code saves, as a run of ours."""

from __future__ import annotations

import argparse
import pathlib
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from fne_jax import configuration
from fne_jax.data import captions as caption_lib
from fne_jax.encoders import freezing, towers
from fne_jax.encoders.pretrained_weights import params_from_tensors
from fne_jax.errors import UserError, first_line, needs_extra
from fne_jax.files import check_new_folder
from fne_jax.model.checkpoints import BEST_METRIC
from fne_jax.model.model import build_model
from fne_jax.objectives.memory_queue import EMPTY_ID, MemoryQueue
from fne_jax.parallel import sharding
from fne_jax.training import workdir as run_folder
from fne_jax.training.checkpointing import Checkpoints
from fne_jax.training.train_state import abstract_state, initial_state

# Beginnings of their names: our tower, and whether it is a momentum encoder.
_PARTS = {
    "visual_encoder.": ("image", False),
    "text_encoder.": ("text", False),
    "visual_encoder_m.": ("image", True),
    "text_encoder_m.": ("text", True),
}


def convert(path: pathlib.Path, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> int:
    """Writes a workdir with the checkpoint's encoders, momentum encoders and queue.

    Their optimizer's state is not in the file, so the run can be evaluated and begun from
    (`init_from`), not resumed where theirs stopped.

    Args:
      path: The checkpoint, `model_best.pth.tar`.
      config: Names the sources of both encoders, for their sizes, and the tokenizer; the length
        of the queue and the margin are taken from the file.
      workdir: A folder that does not exist yet.

    Returns:
      The step under which it is saved, their epoch.

    Raises:
      UserError: if the file is not one of theirs, would run code, or does not fit the config.
    """
    check_new_folder(workdir, "--out")
    saved = _load(path)
    tensors = saved["model"][0]
    config, architectures = configuration.resolve(config)
    for tower in towers.TOWERS:
        if not config.encoder[tower].pretrained:
            raise UserError(f"config.encoder.{tower}.pretrained must name the encoder's source")
    queue = _queue(path, tensors)
    config.queue_size = queue.size
    if "margin" in vars(saved["opt"]):
        config.fne.margin = float(saved["opt"].margin)

    tokenizer = caption_lib.load_tokenizer(config.data.tokenizer)
    mesh = sharding.create_mesh()
    model = build_model(config, architectures, tokenizer, mesh)
    params: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for begin, (tower, momentum) in _PARTS.items():
        own = {
            name.removeprefix(begin): value
            for name, value in tensors.items()
            if name.startswith(begin)
        }
        params[momentum][tower] = params_from_tensors(
            getattr(model.module, tower), own, f"{path}: {begin}* do not fit {tower}"
        )
    state = initial_state(model, abstract_state(model, optax.constant_schedule(0.0)))
    replicated = sharding.replicated(mesh)
    step = int(saved["epoch"])
    own, frozen = freezing.trained_and_frozen(model.module, params[False])
    momentum, _ = freezing.trained_and_frozen(model.module, params[True])
    state = state.replace(
        step=jax.device_put(jnp.int32(step), replicated),
        params=jax.device_put(own, replicated),
        frozen_params=jax.device_put(frozen, replicated),
        momentum_params=jax.device_put(momentum, replicated),
        queue=jax.device_put(queue, replicated),
    )

    # Nothing was written before all of it was known to fit.
    with run_folder.held(workdir):
        # Their data is not known: a run may go on from here on any.
        run_folder.begin(workdir, model, architectures, data={})
        checkpoints = Checkpoints(workdir, config.checkpoint)
        checkpoints.save(state.stored(), {}, {BEST_METRIC: float(saved["best_rsum"])})
        checkpoints.finish()
    return step


def _load(path) -> dict[str, Any]:
    """Returns the file's content without running any code from it; tensors as NumPy arrays."""
    with needs_extra("convert", "reading PyTorch's files"):
        import torch
    try:
        # Tensors, plain containers, and the arguments that the authors' code stores; any other
        # class in the pickle is refused before it is made.
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, it holds more than tensors and settings: {first_line(error)}"
        ) from error
    except Exception as error:  # a damaged pickle fails in whatever its operations have become
        raise UserError(
            f"{path}: not a PyTorch checkpoint, or damaged: {first_line(error)}"
        ) from error
    expected = ("model", "opt", "epoch", "best_rsum")
    if not isinstance(saved, dict) or any(name not in saved for name in expected):
        raise UserError(
            f"{path}: not a checkpoint of the authors' code, which holds {', '.join(expected)}"
        )
    parts = saved["model"]
    tensors = isinstance(parts, list) and all(
        isinstance(part, dict) and all(isinstance(value, torch.Tensor) for value in part.values())
        for part in parts
    )
    numbers = all(isinstance(saved[name], (int, float)) for name in ("epoch", "best_rsum"))
    if not (parts and tensors and numbers and isinstance(saved["opt"], argparse.Namespace)):
        raise UserError(
            f"{path}: not a checkpoint of the authors' code, where model is a list of tensors by "
            "name, opt a Namespace, and epoch and best_rsum are numbers"
        )
    saved["model"] = [{name: value.numpy() for name, value in part.items()} for part in parts]
    return saved


def _queue(path, tensors) -> MemoryQueue:
    """Returns the queue; theirs holds a column a slot, and -100 for empty."""
    names = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
    absent = [name for name in names if name not in tensors]
    if absent:
        raise UserError(f"{path}: the queue is missing: {', '.join(absent)}")
    ids = tensors["idx_queue"].reshape(-1)
    ids = np.where(ids < 0, EMPTY_ID, ids).astype(np.int32)
    return MemoryQueue(
        image=jnp.array(tensors["image_queue"].T),
        text=jnp.array(tensors["text_queue"].T),
        image_id=jnp.array(ids),
        pair_id=jnp.full(ids.shape, EMPTY_ID, jnp.int32),
        pointer=jnp.int32(int(tensors["queue_ptr"].reshape(-1)[0])),
    )

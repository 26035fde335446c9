"""Pretrains both towers separately, as the paper's ViT and BERT are, for a table of docs/study.md.

python -m tests.support.pretraining --config=configs/shapes_reference.py --workdir=DIR --steps=2000

An image tower learns what stands in each quarter of a rendered scene, a text tower masked words;
neither sees which caption belongs to which image.
"""

from __future__ import annotations

import argparse
import logging
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from fne_jax import configuration
from fne_jax.data.batches import BatchOrder, evaluation_images
from fne_jax.data.sources import shapes_scenes
from fne_jax.data.sources.registry import load_split
from fne_jax.data.sources.shapes_scenes import SceneTruth
from fne_jax.encoders.inputs import normalize_pixels
from fne_jax.errors import UserError
from fne_jax.logs import set_up_logging
from fne_jax.model import checkpoints
from fne_jax.model.model import build_model
from fne_jax.model.tokenizers import run_tokenizer
from fne_jax.parallel import sharding
from fne_jax.training import workdir as run_folder
from fne_jax.training.checkpointing import Checkpoints
from fne_jax.training.train_state import abstract_state, first_state

_BATCH = 128  # images, or captions
_LEARNING_RATE = 1e-3  # the peak of a cosine schedule, that of configs/shapes.py
_MASKED = 0.15  # of the words (Devlin et al., BERT, 2019, section 3.1)
_log = logging.getLogger(__name__)


def pretrain_towers(config: ml_collections.ConfigDict, folder: pathlib.Path, steps: int) -> None:
    """Trains both towers of a config separately, and stores them as a run for `config.init_from`.

    Args:
      config: The config of the runs that are to begin with the towers; its data are rendered
        scenes.
      folder: The folder of the run; what already exists is left alone.
      steps: The steps that each tower is trained for.

    Raises:
      UserError: if the data are no rendered scenes, or the folder cannot be written.
    """
    if folder.is_dir() and checkpoints.stored_steps(folder):
        return
    config, architectures = configuration.resolve(config)
    train = load_split(config.data, config.encoder.image.image_size, "train")
    if not isinstance(train.truth, SceneTruth):
        raise UserError(
            f"config.data.source is {config.data.source!r}; only the scenes of shapes tell what "
            "an image tower can learn to name"
        )
    tokenizer = run_tokenizer(config, None, train.captions)
    model = build_model(config, architectures, tokenizer, sharding.create_mesh())
    abstract = abstract_state(model, optax.constant_schedule(0.0))
    state = first_state(model, abstract)
    params = dict(state.params)
    for tower, task, rows in (
        ("image", _image_task, len(train.image_id)),
        ("text", _text_task, len(train.captions)),
    ):
        order = BatchOrder(config.seed, rows, _BATCH)
        params[tower] = _trained(*task(model, train), params[tower], order, steps)
    # A copy: a donated state must not hold one buffer twice.
    state = state.replace(params=params, momentum_params=jax.tree.map(jnp.copy, params))
    with run_folder.held(folder):
        run_folder.begin(folder, model, architectures, {"train": train.identity})
        stored = Checkpoints(folder, config.checkpoint)
        stored.save(state.stored(), {}, {checkpoints.BEST_METRIC: 0.0})
        stored.finish()


def attributes(scene: np.ndarray, shapes: int, colours: int) -> np.ndarray:
    """Returns what stands in each quarter of scenes, as an image tower can learn to name it.

    Args:
      scene: The [images, MAX_OBJECTS, SCENE_FIELDS] int scenes.
      shapes: How many of `shapes_scenes.SHAPES` are used.
      colours: How many of `shapes_scenes.COLOURS` are used.

    Returns:
      [images, 4 * (shapes + colours + 2)] bool: for each of `shapes_scenes.CELLS` whether an object
      of each shape, of each colour and of each size stands there.
    """
    sizes = (shapes, colours, len(shapes_scenes.SIZES))
    starts = np.cumsum((0, *sizes))
    found = np.zeros((len(scene), len(shapes_scenes.CELLS), starts[-1]), bool)
    image, row = np.nonzero(scene[..., 0] != shapes_scenes.UNSTATED)
    objects = scene[image, row]
    half = shapes_scenes.IMAGE_SIZE // 2
    quarter = (objects[:, 4] >= half) * 2 + (objects[:, 3] >= half)
    for field, start in enumerate(starts[:-1]):
        found[image, quarter, start + objects[:, field]] = True
    return found.reshape(len(scene), -1)


def _image_task(model, train):
    """Returns the shape of the head, the inputs of rows, and the loss: what stands in each quarter.

    The loss is a binary cross-entropy.
    """
    config = model.config
    side, shapes = config.encoder.image.image_size, config.data.shapes
    images = np.concatenate(list(evaluation_images(train, side, _BATCH)))
    named = attributes(train.truth.scenes, shapes.shapes, shapes.colours).astype(np.float32)

    def loss(params, head, batch, rng):
        del rng
        pixels, target = batch
        pixels = normalize_pixels(pixels, config.image_mean, config.image_std)
        hidden = _hidden(model, "image", params, pixels)
        return optax.sigmoid_binary_cross_entropy(hidden.mean(axis=1) @ head, target).mean()

    shape = config.encoder.image.width, named.shape[1]
    return shape, lambda rows: (images[rows], named[rows]), loss


def _text_task(model, train):
    """Returns the same for masked words, with the cross-entropy of these."""
    config, tokenizer = model.config, model.tokenizer
    ids, mask = model.tokenize(train.captions, config.data.text_length)
    words = ~np.isin(ids, tokenizer.all_special_ids) & (mask > 0)

    def loss(params, head, batch, rng):
        ids, mask, words = batch
        masked = words & jax.random.bernoulli(rng, _MASKED, words.shape)
        shown = jnp.where(masked, tokenizer.mask_token_id, ids)
        logits = _hidden(model, "text", params, shown, mask) @ head
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        return (losses * masked).sum() / jnp.maximum(masked.sum(), 1)

    shape = config.encoder.text.width, len(tokenizer)
    return shape, lambda rows: (ids[rows], mask[rows], words[rows]), loss


def _hidden(model, tower, params, *inputs):
    """Returns the [batch, tokens, width] float32 hidden states of a tower."""

    def encode(module, *inputs):
        return getattr(module, tower)(*inputs).last_hidden_state

    out = model.module.apply({"params": {tower: params}}, *inputs, method=encode)
    return out.astype(jnp.float32)


def _trained(head_shape, inputs, loss, params, order, steps):
    """Returns a tower's parameters after so many steps of a task; the head is left behind."""
    tx = optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, steps))
    head = nn.initializers.lecun_normal()(jax.random.key(order.seed), head_shape)
    trained = params, head
    state = tx.init(trained)

    @jax.jit
    def update(trained, state, batch, rng):
        value, grads = jax.value_and_grad(lambda both: loss(*both, batch, rng))(trained)
        changes, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, changes), state, value

    for step, rows in enumerate(order.rows(range(steps))):
        rng = jax.random.fold_in(jax.random.key(order.seed), step)
        trained, state, value = update(trained, state, inputs(rows.pair), rng)
        if step % 100 == 0 or step == steps - 1:
            _log.info("step %d of %d: loss %.4f", step + 1, steps, value)
    return trained[0]


def main() -> None:
    """Parses the command line and trains the towers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options, overrides = parser.parse_known_args()
    set_up_logging(logging.INFO)
    config = configuration.load_config(options.config, overrides)
    pretrain_towers(config, options.workdir, options.steps)


if __name__ == "__main__":
    main()

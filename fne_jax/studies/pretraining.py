"""Made for a table of docs/study.md: towers pretrained apart, as the paper's are.

The paper begins with a ViT that knows images and a BERT that knows language. On rendered scenes the
like is an image tower that has learned to name what stands in each quarter of an image, and a text
tower that has learned to fill in masked words; neither has seen which caption belongs to which
image. A run of steps of each is stored as a run's folder, for `config.init_from`. `study
--pretraining` alone uses this module.
"""

from __future__ import annotations

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
from fne_jax.data.sources.registry import load_split
from fne_jax.data.sources.shapes_scenes import SceneTruth, attributes
from fne_jax.encoders.inputs import normalize_pixels
from fne_jax.errors import UserError
from fne_jax.model import checkpoints
from fne_jax.model.model import build_model
from fne_jax.model.tokenizers import run_tokenizer
from fne_jax.parallel import sharding
from fne_jax.training import workdir as run_folder
from fne_jax.training.checkpointing import Checkpoints
from fne_jax.training.train_state import abstract_state, first_state

# Images, or captions, in a batch.
_BATCH = 128
# The peak of a cosine schedule, that of configs/shapes.py.
_LEARNING_RATE = 1e-3
# Of the words of a caption, that are to be filled in (Devlin et al., BERT, 2019, section 3.1).
_MASKED = 0.15
_log = logging.getLogger(__name__)


def is_done(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds pretrained towers."""
    return folder.is_dir() and bool(checkpoints.stored_steps(folder))


def pretrain_towers(config: ml_collections.ConfigDict, folder: pathlib.Path, steps: int) -> None:
    """Trains both towers of a config apart, and stores them as a run for `config.init_from`.

    Args:
      config: The config of the runs that are to begin with the towers; its data are rendered
        scenes.
      folder: The folder of the run; what already exists is left alone.
      steps: The steps that each tower is trained for.

    Raises:
      UserError: if the data are no rendered scenes, or the folder cannot be written.
    """
    if is_done(folder):
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
    order = BatchOrder(config.seed, len(train.image_id), _BATCH)
    image = _trained(_image_loss(model, train), state.params["image"], order, steps)
    order = BatchOrder(config.seed, len(train.captions), _BATCH)
    text = _trained(_text_loss(model, train), state.params["text"], order, steps)
    params = {**state.params, "image": image, "text": text}
    # A copy: a donated state must not hold one buffer twice.
    state = state.replace(params=params, momentum_params=jax.tree.map(jnp.copy, params))
    with run_folder.held(folder):
        run_folder.begin(folder, model, architectures, {"train": train.identity})
        stored = Checkpoints(folder, config.checkpoint)
        stored.save(state, {}, {checkpoints.BEST_METRIC: 0.0})
        stored.finish()


def _image_loss(model, train):
    """Returns the image tower's task: its head's shape, the inputs of rows, and the loss of those.

    The loss is the binary cross-entropy of what stands in each quarter of the images.
    """
    config = model.config
    side, shapes = config.encoder.image.image_size, config.data.shapes
    images = np.concatenate(list(evaluation_images(train, side, _BATCH)))
    named = attributes(train.truth.scenes, shapes.shapes, shapes.colours).astype(np.float32)

    def inputs(rows):
        return images[rows], named[rows]

    def loss(params, head, batch, rng):
        del rng
        pixels, target = batch
        pixels = normalize_pixels(pixels, config.image_mean, config.image_std)
        hidden = model.module.apply(
            {"params": {"image": params}}, pixels, method=lambda module, x: module.image(x)
        ).last_hidden_state
        logits = hidden.astype(jnp.float32).mean(axis=1) @ head
        return optax.sigmoid_binary_cross_entropy(logits, target).mean()

    return (config.encoder.image.width, named.shape[1]), inputs, loss


def _text_loss(model, train):
    """Returns the same of the text tower: the cross-entropy of the words that are masked."""
    config, tokenizer = model.config, model.tokenizer
    ids, mask = model.tokenize(train.captions, config.data.text_length)
    words = ~np.isin(ids, tokenizer.all_special_ids) & (mask > 0)

    def inputs(rows):
        return ids[rows], mask[rows], words[rows]

    def loss(params, head, batch, rng):
        ids, mask, words = batch
        hidden_words = words & jax.random.bernoulli(rng, _MASKED, words.shape)
        shown = jnp.where(hidden_words, tokenizer.mask_token_id, ids)
        hidden = model.module.apply(
            {"params": {"text": params}},
            shown,
            mask,
            method=lambda module, *tokens: module.text(*tokens),
        ).last_hidden_state
        losses = optax.softmax_cross_entropy_with_integer_labels(
            hidden.astype(jnp.float32) @ head, ids
        )
        return (losses * hidden_words).sum() / jnp.maximum(hidden_words.sum(), 1)

    return (config.encoder.text.width, len(tokenizer)), inputs, loss


def _trained(task, params, order, steps):
    """Returns a tower's parameters after so many steps of a task; the head is left behind."""
    head_shape, inputs, loss = task
    tx = optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, steps))
    head = nn.initializers.lecun_normal()(jax.random.key(order.seed), head_shape)
    trained = {"tower": params, "head": head}
    state = tx.init(trained)

    @jax.jit
    def update(trained, state, batch, rng):
        value, grads = jax.value_and_grad(
            lambda trained: loss(trained["tower"], trained["head"], batch, rng)
        )(trained)
        changes, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, changes), state, value

    for step, rows in enumerate(order.rows(range(steps))):
        rng = jax.random.fold_in(jax.random.key(order.seed), step)
        trained, state, value = update(trained, state, inputs(rows.pair), rng)
        if step % 100 == 0 or step == steps - 1:
            _log.info("step %d of %d: loss %.4f", step + 1, steps, value)
    return trained["tower"]

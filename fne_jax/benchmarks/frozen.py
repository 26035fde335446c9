"""A config's train step with more and more of its encoders frozen, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from fne_jax.benchmarks.timing import machine, median_seconds
from fne_jax.configuration import validate, with_model_defaults
from fne_jax.model.model import Model, build_model, build_module
from fne_jax.parallel import sharding
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.training.compiled_steps import abstract_batch, jitted_steps
from fne_jax.training.timeline import Phase, Timeline
from fne_jax.training.train_state import abstract_state, initial_state

# It changes no work.
_STEPS_PER_EPOCH = 1000
_IDS = ("image_id", "pair_id")


def variants(layers: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Returns the fields of each variant by its name, the first with nothing frozen.

    Args:
      layers: The number of layers of each tower.
    """
    last_two = {
        f"encoder.{tower}.frozen_layers": str(max(count - 2, 0)) for tower, count in layers.items()
    }
    image = {"encoder.image.frozen_layers": "all"}
    return {
        "nothing frozen": {},
        "image tower frozen": image,
        "image tower frozen and kept": image | {"data.keep_frozen": True},
        "all but the last two layers frozen and kept": last_two | {"data.keep_frozen": True},
    }


def frozen_steps(
    config: ml_collections.ConfigDict,
    architectures: Mapping[str, Mapping[str, Any]],
    repeats: int,
) -> dict[str, Any]:
    """Times FNE steps on the first device, those of all variants in turns, over random batches.

    The weights are random, and the batch stays on the device: no data is read.

    Args:
      config: As loaded; what it freezes and keeps is left aside.
      architectures: The config.json of each pretrained tower.
      repeats: Steps of each that count.

    Returns:
      For each variant the median seconds of a step and its share of the first variant's, the
      compiler's bytes of memory, and the bytes of the state.

    Raises:
      UserError: if the config does not suit a made-up batch.
    """
    use_compile_cache(config.compile_cache)
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    vocabulary = 1 if config.encoder.text.pretrained else config.data.vocab_size
    whole = build_module(with_model_defaults(config, architectures), architectures, vocabulary)
    layers = {"image": whole.image.layers, "text": whole.text.layers}
    functions, sizes = {}, {}
    for name, fields in variants(layers).items():
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict(
            {
                "data.augmentation": "none",
                "data.keep_frozen": False,
                "encoder.image.frozen_layers": "none",
                "encoder.text.frozen_layers": "none",
            }
            | fields
        )
        validate(own)
        own = with_model_defaults(own, architectures)
        module = build_module(own, architectures, vocabulary, mesh)
        model = build_model(own, architectures, None, mesh, module=module)
        functions[name], sizes[name] = _step(model)
    seconds = median_seconds(functions, repeats)
    first = next(iter(seconds.values()))
    return {
        "variants": {
            name: {"step_s": value, "of_nothing_frozen": value / first} | sizes[name]
            for name, value in seconds.items()
        },
        "global_batch_size": config.global_batch_size,
        **machine(),
    }


def _step(model: Model):
    """Returns a function that runs a step and gives its loss, and what memory it takes."""
    config, timeline = model.config, Timeline.of(model.config, _STEPS_PER_EPOCH)
    schedule = optax.constant_schedule(1e-5)
    like = abstract_state(model, schedule)
    batch = {name: _random(array) for name, array in abstract_batch(model).items()}
    batch |= {name: np.arange(config.global_batch_size, dtype=np.int32) for name in _IDS}
    batch = sharding.to_devices(batch, model.mesh)
    step = jitted_steps(config, timeline, model, schedule, like)[Phase.FNE]
    compiled = step.lower(like, batch).compile()
    state = initial_state(model, like)

    def run():
        nonlocal state
        state, scalars, _ = compiled(state, batch)
        return scalars["loss"]

    memory = compiled.memory_analysis()
    return run, {
        "scratch_bytes": memory.temp_size_in_bytes,
        "state_bytes": sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like.stored())
        ),
    }


def _random(like):
    rng = np.random.default_rng(0)
    if like.dtype == jnp.uint8:
        return rng.integers(0, 256, like.shape, np.uint8)
    if like.dtype == jnp.int32:  # of words and of masks
        return np.ones(like.shape, np.int32)
    return rng.normal(size=like.shape).astype(like.dtype)

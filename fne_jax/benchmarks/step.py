"""The whole train step on one device, over a made-up batch, with encoders of random weights."""

from __future__ import annotations

import collections
import re
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from fne_jax.benchmarks.timing import machine, window_seconds
from fne_jax.encoders.inputs import FEATURES
from fne_jax.parallel import sharding
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.planning.program import memory_bytes, training_without_data
from fne_jax.training.setup import Training
from fne_jax.training.timeline import Phase
from fne_jax.training.train_state import initial_state

_KERNEL = re.compile(r'custom_call_target="([^"]+)"')


def training_on_one_device(config: ml_collections.ConfigDict) -> Training:
    """Returns the training of a config on the first device; neither data nor weights are read.

    Raises UserError if the config names known matches, or a pretrained source that is missing.
    """
    return training_without_data(config, sharding.create_mesh(devices=jax.devices()[:1]))


def made_up_batch(training: Training) -> dict[str, np.ndarray]:
    """Returns random pixels and captions of full length, every pair of an image of its own.

    What is kept of frozen encoders is random too.
    """
    rng, batch = np.random.default_rng(0), {}
    highest = {"image": 256, "input_ids": training.model.module.text.vocab_size}
    for name, like in training.abstract_batch().items():
        if name in highest:
            batch[name] = rng.integers(0, highest[name], like.shape, like.dtype)
        elif name == "attention_mask":
            batch[name] = np.ones(like.shape, like.dtype)
        elif name in FEATURES.values():
            batch[name] = rng.normal(size=like.shape).astype(like.dtype)
        else:
            batch[name] = np.arange(len(like), dtype=like.dtype)
    return batch


def jax_step(config: ml_collections.ConfigDict, steps: int, windows: int) -> dict[str, Any]:
    """Times steps of the phase FNE on the first device, one after the other without waiting.

    The batch stays on the device: no data is read. A window of steps is waited for as a whole;
    three steps before the first are not timed.

    Returns:
      Seconds a step of each window, bytes of the device's memory by the runtime's count (None
      where it has none) and by the compiler's, the kernels that XLA calls by name and how often
      the program does, and whether the last step changed the weights.

    Raises UserError if the config does not suit a made-up batch or the device.
    """
    use_compile_cache(config.compile_cache)
    training = training_on_one_device(config)
    start = time.perf_counter()
    compiled = training.compiled([Phase.FNE])[Phase.FNE]
    compile_seconds = time.perf_counter() - start
    state, scalars = initial_state(training.model, training.state), {}
    batch = sharding.to_devices(made_up_batch(training), training.model.mesh)

    def step():
        nonlocal state, scalars
        state, scalars, _ = compiled(state, batch)

    seconds = window_seconds(step, lambda: jax.block_until_ready(state), steps, windows)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "platform": jax.default_backend(),
        "dtype": config.encoder.compute_dtype,
        "window_step_s": seconds,
        "compile_s": compile_seconds,
        "applied": bool(scalars["applied"]),
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "compiled_bytes": memory_bytes(compiled.memory_analysis()),
        "kernels": dict(collections.Counter(_KERNEL.findall(compiled.as_text()))),
        **machine(),
    }

"""The whole train step on one device, over a made-up batch, with encoders of random weights.

Either as the config says, or with more and more of its encoders frozen, side by side.
"""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fne_jax.benchmarks.encoders import BERT_IDS, PEAK_SIDE, image_tokens, square_product
from fne_jax.benchmarks.timing import machine, median_seconds, window_seconds
from fne_jax.configuration import validate, with_model_defaults
from fne_jax.encoders.attention import resolve
from fne_jax.encoders.towers import TOWERS
from fne_jax.errors import UserError
from fne_jax.model.model import build_model, build_module
from fne_jax.objectives.registry import NO_ORACLE, uses_matches
from fne_jax.parallel import sharding
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.planning.program import memory_bytes
from fne_jax.training.setup import Training
from fne_jax.training.timeline import Phase
from fne_jax.training.train_state import initial_state

# Published towers whose sizes are those that configs/base.py gives.
_SIZED_AS_BASE = {"image": "google/vit-base-patch16-384", "text": "bert-base-uncased"}
# The program holds it as a constant; it changes no work.
_STEPS_PER_EPOCH = 1000
_KERNEL = re.compile(r'custom_call_target="([^"]+)"')


def with_random_towers(
    config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, int]:
    """Returns a config whose towers have random weights of the same sizes, and the number of ids.

    Raises:
      UserError: if a tower's sizes are those of a checkpoint that would have to be read, or the
        step takes more than a batch.
    """
    config = config.copy_and_resolve_references()
    if uses_matches(config):
        raise UserError(
            f"config.objective.oracle is {config.objective.oracle!r} and config.data.matches "
            f"{config.data.matches!r}: a made-up batch has no matches; make them {NO_ORACLE} and ''"
        )
    ids = BERT_IDS if config.encoder.text.pretrained else config.data.vocab_size
    for tower in TOWERS:
        name = config.encoder[tower].pretrained
        if name not in ("", _SIZED_AS_BASE[tower]):
            raise UserError(
                f"config.encoder.{tower}.pretrained is {name!r}, whose sizes are not in the config;"
                f" make it {_SIZED_AS_BASE[tower]!r}, or '' with sizes of your own"
            )
        config.encoder[tower].pretrained = ""
    return with_model_defaults(config, architectures={}), ids


def made_up_batch(config: ml_collections.ConfigDict, ids: int) -> dict[str, np.ndarray]:
    """Returns random pixels and captions of full length, every pair of an image of its own."""
    batch, side = config.global_batch_size, config.encoder.image.image_size
    rng = np.random.default_rng(0)
    tokens = (batch, config.data.text_length)
    return {
        "image": rng.integers(0, 256, (batch, side, side, 3), np.uint8),
        "input_ids": rng.integers(0, ids, tokens, np.int32),
        "attention_mask": np.ones(tokens, np.int32),
        "image_id": np.arange(batch, dtype=np.int32),
        "pair_id": np.arange(batch, dtype=np.int32),
    }


def jax_step(config: ml_collections.ConfigDict, steps: int, windows: int) -> dict[str, Any]:
    """Times steps of the phase FNE on the first device, one after the other without waiting.

    The batch stays on the device: no data is read.

    Args:
      config: As loaded; its mesh is not looked at.
      steps: Steps in a window, which is waited for as a whole.
      windows: Windows timed, after three steps that are not.

    Returns:
      Seconds a step of each window, bytes of the device's memory by the runtime's count (None
      where it has none) and by the compiler's, the kernels that XLA calls by name and how often
      the program does, and whether the last step changed the weights.

    Raises:
      UserError: if the config does not suit a made-up batch or the device.
    """
    config, ids = with_random_towers(config)
    use_compile_cache(config.compile_cache)
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    model = build_model(config, {}, None, mesh, module=build_module(config, {}, ids, mesh))
    step = _Step(Training.of(model, _STEPS_PER_EPOCH), made_up_batch(config, ids))
    seconds = window_seconds(step, lambda: jax.block_until_ready(step.state), steps, windows)
    memory = jax.devices()[0].memory_stats() or {}
    # After the step's memory was read, to which these matrices would add.
    product = square_product(config.encoder.compute_dtype)
    peak_seconds = median_seconds({"peak": product}, windows)["peak"]
    return {
        "platform": jax.default_backend(),
        "dtype": config.encoder.compute_dtype,
        "attention": _attention(config, mesh),
        "remat": config.encoder.remat,
        "scan_layers": config.encoder.scan_layers,
        "window_step_s": seconds,
        "compile_s": step.compile_seconds,
        "applied": bool(step.scalars["applied"]),
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "compiled_bytes": memory_bytes(step.compiled.memory_analysis()),
        "kernels": dict(collections.Counter(_KERNEL.findall(step.compiled.as_text()))),
        "square_product_flops_per_s": 2 * PEAK_SIDE**3 / peak_seconds,
        **machine(),
    }


def variants(layers: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Returns the fields of each variant by its name, the first with nothing frozen."""
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
    functions, sizes, rng = {}, {}, np.random.default_rng(0)
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
        training = Training.of(model, _STEPS_PER_EPOCH)
        batch, made_up = {}, made_up_batch(own, vocabulary)
        for part, like in training.abstract_batch().items():
            # Beside what a batch has there is what frozen encoders make of it.
            features = rng.normal(size=like.shape).astype(like.dtype)
            batch[part] = made_up.get(part, features)
        step = functions[name] = _Step(training, batch)
        sizes[name] = {
            "scratch_bytes": step.compiled.memory_analysis().temp_size_in_bytes,
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(step.state.stored())),
        }
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


class _Step:
    """An FNE step, compiled, with state and batch on the devices; a call makes one step."""

    def __init__(self, training, batch):
        start = time.perf_counter()
        self.compiled = training.compiled([Phase.FNE])[Phase.FNE]
        self.compile_seconds = time.perf_counter() - start
        self.state = initial_state(training.model, training.state)
        self.scalars = None
        self._batch = sharding.to_devices(batch, training.model.mesh)

    def __call__(self):
        self.state, self.scalars, _ = self.compiled(self.state, self._batch)
        return self.scalars


def _attention(config, mesh):
    """Returns how each tower computes attention."""
    encoder = config.encoder
    tokens = {"image": image_tokens(encoder), "text": config.data.text_length}
    return {
        tower: resolve(
            encoder.attention, queries=count, dtype=jnp.dtype(encoder.compute_dtype), mesh=mesh
        )
        for tower, count in tokens.items()
    }

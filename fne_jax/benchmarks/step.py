"""The whole train step on one device, over a made-up batch, with encoders of random weights."""

from __future__ import annotations

import collections
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fne_jax.benchmarks.encoders import PEAK_SIDE, image_tokens, square_product
from fne_jax.benchmarks.timing import machine, median_seconds, window_seconds
from fne_jax.configuration import with_model_defaults
from fne_jax.encoders.attention import resolve
from fne_jax.encoders.towers import TOWERS
from fne_jax.errors import UserError
from fne_jax.model.model import build_model, build_module
from fne_jax.objectives.registry import NO_ORACLE, uses_matches
from fne_jax.parallel import sharding
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.training.compiled_steps import jitted_steps
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.timeline import Phase, Timeline
from fne_jax.training.train_state import abstract_state, initial_state

# Published towers whose sizes are those that configs/base.py gives, and the ids of the text tower.
_SIZED_AS_BASE = {"image": "google/vit-base-patch16-384", "text": "bert-base-uncased"}
_BERT_IDS = 30522
# The program holds it as a constant; it changes no work.
_STEPS_PER_EPOCH = 1000
_KERNEL = re.compile(r'custom_call_target="([^"]+)"')


def with_random_towers(
    config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, int]:
    """Returns a config whose towers have random weights of the same sizes, and the number of ids.

    Args:
      config: As loaded.

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
    ids = _BERT_IDS if config.encoder.text.pretrained else config.data.vocab_size
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
    """Returns random pixels and captions of full length, every pair of an image of its own.

    Args:
      config: What `with_random_towers` returned.
      ids: The number of the tokenizer's ids.
    """
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
    timeline = Timeline.of(config, _STEPS_PER_EPOCH)
    schedule = learning_rate_schedule(config.optimizer, _STEPS_PER_EPOCH, timeline.total_steps)
    like = abstract_state(model, schedule)
    batch = sharding.to_devices(made_up_batch(config, ids), mesh)
    step = jitted_steps(config, timeline, model, schedule, like)[Phase.FNE]
    start = time.perf_counter()
    compiled = step.lower(like, batch).compile()
    compile_seconds = time.perf_counter() - start
    state = initial_state(model, like)
    applied = None

    def run():
        nonlocal state, applied
        state, scalars, _ = compiled(state, batch)
        applied = scalars["applied"]

    seconds = window_seconds(run, lambda: jax.block_until_ready(state), steps, windows)
    memory, planned = jax.devices()[0].memory_stats() or {}, compiled.memory_analysis()
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
        "compile_s": compile_seconds,
        "applied": bool(applied),
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "compiled_bytes": planned.argument_size_in_bytes
        + planned.output_size_in_bytes
        - planned.alias_size_in_bytes
        + planned.temp_size_in_bytes,
        "kernels": dict(collections.Counter(_KERNEL.findall(compiled.as_text()))),
        "square_product_flops_per_s": 2 * PEAK_SIDE**3 / peak_seconds,
        **machine(),
    }


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

"""A run's encoders as programs that jax runs (with flatbuffers), weights included."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.export
import jax.numpy as jnp

from fne_jax.encoders.freezing import TOWERS
from fne_jax.encoders.inputs import embed_one
from fne_jax.files import write_atomically
from fne_jax.model.model import Model

PLATFORMS = ("cpu", "cuda", "tpu")


def write_stablehlo(model: Model, out: pathlib.Path) -> None:
    """Writes `image.stablehlo` and `text.stablehlo`, which `jax.export.deserialize` reads.

    They return [n, dim] float32 unit embeddings, as the run computes them: one of [n, side, side,
    3] uint8 pixels, the other of ids and masks, both [n, tokens] int32. n and tokens may be any.

    Args:
      model: The model.
      out: The folder, which exists.
    """
    config, module = model.config, model.module
    # What fits each platform, and any number of tokens.
    portable = {name: getattr(module, name).clone(attention="xla", mesh=None) for name in TOWERS}
    module = module.clone(**portable)
    side, most = config.encoder.image.image_size, module.text.max_tokens
    pixels = jax.export.symbolic_shape(f"n, {side}, {side}, 3")
    tokens = jax.export.symbolic_shape("n, tokens", constraints=[f"tokens <= {most}"])
    ids = jax.ShapeDtypeStruct(tokens, jnp.int32)
    inputs = {
        "image": {"image": jax.ShapeDtypeStruct(pixels, jnp.uint8)},
        "text": {"input_ids": ids, "attention_mask": ids},
    }
    # Constants of the programs, on one device wherever they lie here.
    params = jax.tree.map(jnp.asarray, jax.device_get(model.params))
    statistics = config.image_mean, config.image_std

    def embed(tower, *arrays):
        batch = dict(zip(inputs[tower], arrays, strict=True))
        return embed_one(module.apply, params, batch, statistics, tower)

    for tower, batch in inputs.items():
        program = jax.jit(functools.partial(embed, tower))
        exported = jax.export.export(program, platforms=PLATFORMS)(*batch.values())
        write_atomically(out / f"{tower}.stablehlo", bytes(exported.serialize()))

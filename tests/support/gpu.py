"""What tests marked `gpu` run, in processes of their own: pytest's own JAX has CPUs alone.

`python -m tests.support.gpu attention NAME` and `python -m tests.support.gpu resume FOLDER` print
one JSON object each, on whatever device JAX takes.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.encoders.attention import attend
from fne_jax.model import checkpoints
from fne_jax.training import loop
from tests.support import TOP
from tests.support.runs import stored_state
from tests.support.tiny import tiny_config

# [batch, tokens, heads, dim], and whether captions end early, or queries see earlier tokens alone.
SHAPES = {
    "vit": ((2, 577, 12, 64), False, False),
    "captions": ((3, 30, 12, 64), True, False),
    "causal": ((3, 77, 8, 64), False, True),
}


def on_gpu(**variables):
    """Returns the environment of a process that takes the GPU, and fails where there is none."""
    return os.environ | {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""} | variables


def run_on_gpu(*arguments, **variables):
    """Returns what this module printed there, run with arguments."""
    command = [sys.executable, "-m", "tests.support.gpu", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=TOP, env=on_gpu(**variables), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def attention(name):
    """Returns by shape how far an implementation and "xla" are from float32, both in bfloat16.

    For the result and the gradients of query, key and value: the largest difference over the
    largest value.
    """
    found = {}
    for shape, (sizes, padded, causal) in SHAPES.items():
        keys = jax.random.split(jax.random.key(0), 4)
        *arrays, grad = (jax.random.normal(key, sizes, jnp.bfloat16) for key in keys)
        lengths = sizes[1] - 7 * np.arange(sizes[0])
        mask = jnp.asarray(np.arange(sizes[1]) < lengths[:, None]) if padded else None

        def run(implementation, dtype, arrays=arrays, grad=grad, mask=mask, causal=causal):
            def mix(*arrays):
                return attend(*arrays, mask, causal=causal, implementation=implementation)

            out, pull = jax.vjp(mix, *(array.astype(dtype) for array in arrays))
            return [np.asarray(x, np.float32) for x in (out, *pull(grad.astype(dtype)))]

        exact = run("xla", jnp.float32)
        found[shape] = {
            label: [float(abs(x - y).max() / abs(y).max()) for x, y in zip(got, exact, strict=True)]
            for label, got in (("own", run(name, jnp.bfloat16)), ("xla", run("xla", jnp.bfloat16)))
        }
    return found


def resume(folder):
    """Returns the fingerprints of a tiny run's state, at one go and stopped in between."""
    # As many tokens as take the fused kernel, and heads of the dimension of ViT's.
    config = tiny_config(
        encoder__compute_dtype="bfloat16", encoder__image__image_size=56, num_epochs=3.0
    )
    for tower in ("image", "text"):
        config.encoder[tower].update(width=128, layers=2, heads=2, mlp_width=64)
    folder = pathlib.Path(folder)
    loop.train_and_evaluate(config, folder / "whole")
    loop.train_and_evaluate(config, folder / "parts", warmup_only=True)
    loop.train_and_evaluate(config, folder / "parts")
    states = {name: stored_state(folder / name) for name in ("whole", "parts")}
    return {
        "platform": jax.default_backend(),
        "steps": [int(state.step) for state in states.values()],
        "fingerprints": [
            str(checkpoints.fingerprints(state.stored())) for state in states.values()
        ],
    }


if __name__ == "__main__":
    what, argument = sys.argv[1:]
    print(json.dumps({"attention": attention, "resume": resume}[what](argument)))

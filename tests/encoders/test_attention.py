"""Implementations of attention: equal results and gradients, and which of them runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fne_jax.encoders import attention
from fne_jax.encoders.attention import ATTENTIONS, attend, resolve
from fne_jax.encoders.vision_transformer import VisionTransformer
from fne_jax.errors import UserError

RUN_ON_CPU = [name for name in ATTENTIONS if name != "cudnn"]
BATCH, TOKENS, HEADS, DIM = 3, 11, 2, 5


def masks():
    shorter = jnp.arange(TOKENS)[None, :] < jnp.array([11, 4, 1])[:, None]
    causal = jnp.tril(jnp.ones((1, TOKENS, TOKENS), bool))
    nothing = shorter.at[1].set(False)
    return {
        "none": None,
        "padding": shorter[:, None],
        "causal and padding": causal & shorter[:, None],
        "a row that sees nothing": nothing[:, None],
    }


def inputs(queries=TOKENS, dtype=jnp.float32):
    shapes = [(BATCH, queries, HEADS, DIM), *[(BATCH, TOKENS, HEADS, DIM)] * 2]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s, dtype) * 2 for k, s in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(name, arrays, mask):
    def run(*arrays):
        return attend(*arrays, mask, implementation=name)

    out, pull = jax.vjp(run, *arrays)
    return out, *pull(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


def direct(query, key, value, mask):
    """The definition, head by head, in float64."""
    out = np.zeros(query.shape)
    mask = None if mask is None else np.broadcast_to(mask, (BATCH, query.shape[1], TOKENS))
    for example in range(BATCH):
        for head in range(HEADS):
            q, k, v = (np.float64(x)[example, :, head] for x in (query, key, value))
            scores = q @ k.T / np.sqrt(DIM)
            if mask is not None:
                scores = np.where(mask[example], scores, -1e30)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[example, :, head] = weights / weights.sum(axis=1, keepdims=True) @ v
    return out


@pytest.mark.parametrize("name", RUN_ON_CPU)
@pytest.mark.parametrize("mask", masks())
def test_agrees_with_the_definition(name, mask):
    arrays, mask = inputs(), masks()[mask]
    out = jax.jit(attend, static_argnames="implementation")(*arrays, mask, implementation=name)
    np.testing.assert_allclose(out, direct(*arrays, mask), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in RUN_ON_CPU if name != "xla"])
@pytest.mark.parametrize("mask", masks())
def test_gradients_agree(name, mask):
    arrays, mask = inputs(), masks()[mask]
    expected = output_and_gradients("xla", arrays, mask)
    ours = output_and_gradients(name, arrays, mask)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in RUN_ON_CPU if name != "xla"])
def test_one_query_and_half_precision_agree(name):
    for queries, dtype, tolerance in ((1, jnp.float32, 1e-5), (TOKENS, jnp.bfloat16, 0.1)):
        arrays = inputs(queries, dtype)
        expected = output_and_gradients("xla", arrays, None)
        ours = output_and_gradients(name, arrays, None)
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == b.dtype == dtype
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance)


@pytest.mark.parametrize("name", [name for name in RUN_ON_CPU if name != "xla"])
def test_large_scores_stay_finite(name):
    query, key, value = inputs()
    for out in output_and_gradients(name, (query * 1e3, key * 1e3, value), masks()["padding"]):
        assert np.isfinite(out).all()


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": True}], ids=str)
def test_the_choice_reaches_the_layers(options, monkeypatch):
    used = []
    spied = lambda *x: used.append(x) or ATTENTIONS["xla"](*x)  # noqa: E731
    monkeypatch.setitem(attention.ATTENTIONS, "spied", spied)
    sizes = {"width": 12, "layers": 2, "heads": 3, "mlp_width": 20}
    tower = VisionTransformer(8, 4, **sizes, attention="spied", **options)
    jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert used


def test_auto_loops_over_long_sequences_on_one_cpu(monkeypatch):
    # The tests' eight devices are several.
    assert resolve("auto", queries=577) == "xla"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert resolve("auto", queries=577) == "head_loop"
    assert resolve("auto", queries=30) == "xla"
    assert resolve("xla", queries=577) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert resolve("auto", queries=577) == "xla"


def test_what_cannot_run_here_is_refused(monkeypatch):
    with pytest.raises(UserError, match="attention is 'flash'; expected one of auto, xla, cudnn"):
        attend(*inputs(), None, implementation="flash")
    with pytest.raises(UserError, match="on GPUs only, and this is cpu"):
        attend(*inputs(), None, implementation="cudnn")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="needs half precision, and the compute dtype is float32"):
        attend(*inputs(), None, implementation="cudnn")
    query, key, value = (jnp.zeros((2, length, 3, 8), jnp.bfloat16) for length in (4, 6, 6))
    with pytest.raises(UserError, match="no mask of one row for all 4 queries"):
        attend(query, key, value, jnp.ones((2, 1, 6), bool), implementation="cudnn")
    with pytest.raises(UserError, match="even lengths, and there are 4 queries and 5 tokens"):
        attend(query, key[:, 1:], value[:, 1:], None, implementation="cudnn")

"""Implementations of attention: equal results and gradients, and which of them runs."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from fne_jax.encoders import attention
from fne_jax.encoders.attention import ATTENTIONS, attend, resolve, xla_attention
from fne_jax.encoders.clip import ClipText
from fne_jax.encoders.fused_attention import on_each_device, padded, splash_attention
from fne_jax.encoders.siglip import SiglipText, SiglipVision
from fne_jax.encoders.vision_transformer import VisionTransformer
from fne_jax.errors import UserError
from fne_jax.parallel.sharding import StepLayout
from fne_jax.planning import hlo
from tests.support.runs import mesh_of

RUN_ON_CPU = ["xla", "head_loop"]
BATCH, TOKENS, HEADS, DIM = 3, 11, 2, 5


# What attention is asked to hide: its mask, and whether later tokens.
HIDDEN = {
    "nothing": (None, False),
    "padding": ([11, 4, 1], False),
    "later tokens": (None, True),
    "padding and later tokens": ([11, 4, 1], True),
    "holes": ("holes", False),
    "all of a row": ([11, 0, 1], False),
}


def hidden(kind):
    lengths, causal = HIDDEN[kind]
    if lengths == "holes":
        return jnp.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % 3 > 0, causal
    if lengths is None:
        return None, causal
    return jnp.arange(TOKENS)[None, :] < jnp.array(lengths)[:, None], causal


def inputs(queries=TOKENS, dtype=jnp.float32):
    shapes = [(BATCH, queries, HEADS, DIM), *[(BATCH, TOKENS, HEADS, DIM)] * 2]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s, dtype) * 2 for k, s in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnames=("run", "causal"))
def output_and_gradients(run, arrays, mask=None, causal=False):
    out, pull = jax.vjp(lambda *arrays: run(*arrays, mask, causal=causal), *arrays)
    return out, *pull(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


def assert_agrees(run, arrays, mask=None, causal=False, *, atol):
    """Asserts that output and gradients are those of the plain products."""
    expected = output_and_gradients(xla_attention, arrays, mask, causal)
    ours = output_and_gradients(run, arrays, mask, causal)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype == arrays[0].dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=atol)


def direct(query, key, value, mask, causal):
    """The definition, head by head, in float64."""
    out = np.zeros(query.shape)
    seen = np.ones((BATCH, TOKENS, TOKENS), bool) if mask is None else np.array(mask)[:, None]
    seen = seen & np.tri(TOKENS, dtype=bool) if causal else seen
    for example in range(BATCH):
        for head in range(HEADS):
            q, k, v = (np.float64(x)[example, :, head] for x in (query, key, value))
            scores = np.where(seen[example], q @ k.T / np.sqrt(DIM), -1e30)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[example, :, head] = weights / weights.sum(axis=1, keepdims=True) @ v
    return out


@pytest.mark.parametrize("name", RUN_ON_CPU)
@pytest.mark.parametrize("kind", HIDDEN)
def test_agrees_with_the_definition(name, kind):
    arrays, (mask, causal) = inputs(), hidden(kind)
    run = jax.jit(attend, static_argnames=("causal", "implementation"))
    out = run(*arrays, mask, causal=causal, implementation=name)
    np.testing.assert_allclose(out, direct(*arrays, mask, causal), atol=1e-5)


@pytest.mark.parametrize("kind", HIDDEN)
def test_gradients_of_the_loop_agree(kind):
    assert_agrees(ATTENTIONS["head_loop"], inputs(), *hidden(kind), atol=1e-5)


def test_one_query_and_half_precision_agree_in_the_loop():
    assert_agrees(ATTENTIONS["head_loop"], inputs(queries=1), atol=1e-5)
    assert_agrees(ATTENTIONS["head_loop"], inputs(dtype=jnp.bfloat16), atol=0.1)


def test_large_scores_stay_finite():
    query, key, value = inputs()
    mask, _ = hidden("padding")
    arrays = (query * 1e3, key * 1e3, value)
    for out in output_and_gradients(ATTENTIONS["head_loop"], arrays, mask):
        assert np.isfinite(out).all()


def plain_kernel(query, key, value, mask, *, causal, tokens):
    """Stands for a kernel that takes multiples of 8 alone."""
    assert query.shape[1] % 8 == key.shape[1] % 8 == value.shape[1] % 8 == 0
    if mask is None:
        mask = jnp.broadcast_to(jnp.arange(key.shape[1]) < tokens, key.shape[:2])
    return xla_attention(query, key, value, mask, causal=causal)


@pytest.mark.parametrize("kind", [kind for kind in HIDDEN if kind != "all of a row"])
def test_padding_to_a_kernels_length_changes_nothing(kind):
    run = padded(8)(plain_kernel)
    assert_agrees(run, inputs(), *hidden(kind), atol=1e-5)


def test_one_query_is_padded():
    run = padded(8)(plain_kernel)
    assert_agrees(run, inputs(queries=1), atol=1e-5)


def test_a_kernel_carries_the_lengths_without_padding():
    def mixed(query, key, value):
        return padded(8)(plain_kernel)(query, key, value, None).sum()

    program = jax.jit(jax.grad(mixed)).lower(*inputs(queries=5)).compile()
    found = hlo.parse(program.as_text())
    names = {i.op_name for c in found.computations.values() for i in c.instructions.values()}
    scopes = [name for name in names if f"attention_5x{TOKENS}" in name]
    assert any("transpose" in name for name in scopes)
    assert any("transpose" not in name for name in scopes)


@pytest.fixture
def interpreted(monkeypatch):
    """Lets the Pallas kernel run on a CPU, slowly."""
    make = functools.partial(splash_attention_kernel.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha_single_device", make)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["padding and later tokens", *map(slow, ("nothing", "holes"))])
def test_splash_attention_agrees(kind, interpreted):
    # Interpreted, it computes in float32 what it is given in it, and rounding hides nothing.
    assert_agrees(splash_attention, inputs(), *hidden(kind), atol=1e-4)


@pytest.mark.slow
def test_splash_attention_in_half_precision(interpreted):
    arrays = inputs(dtype=jnp.bfloat16)
    assert_agrees(splash_attention, arrays, *hidden("padding"), atol=0.1)


@pytest.mark.slow
def test_splash_attention_of_several_blocks_agrees(interpreted):
    # 700 tokens are padded to 768, two blocks of 384.
    keys = jax.random.split(jax.random.key(1), 3)
    arrays = [jax.random.normal(key, (1, 700, 1, 16)) for key in keys]
    assert_agrees(splash_attention, arrays, atol=1e-4)


@pytest.mark.parametrize("batch", [8, 3])
def test_each_device_computes_its_own_rows(batch):
    rows = []

    def spied(query, key, value, mask):
        rows.append(len(query))
        return xla_attention(query, key, value, mask)

    keys = jax.random.split(jax.random.key(2), 3)
    arrays = [jax.random.normal(key, (batch, TOKENS, HEADS, DIM)) for key in keys]
    mask = jnp.arange(TOKENS)[None] < jnp.arange(1, batch + 1)[:, None]
    out = jax.jit(on_each_device(spied, mesh_of(2, 4)))(*arrays, mask)
    np.testing.assert_allclose(out, xla_attention(*arrays, mask), atol=1e-6)
    assert set(rows) == {1 if batch == 8 else 3}  # a batch that does not divide is not split


def test_rows_that_are_split_already_are_not_split_again():
    rows, mesh = [], mesh_of(2, 4)

    def spied(query, key, value, mask):
        rows.append(len(query))
        return xla_attention(query, key, value, mask)

    keys = jax.random.split(jax.random.key(3), 3)
    arrays = [jax.random.normal(key, (16, TOKENS, HEADS, DIM)) for key in keys]
    run = on_each_device(spied, mesh)

    def on_rows(params, arrays, rng):
        return run(*arrays, None)

    out = jax.jit(lambda arrays: StepLayout(mesh).on_rows(on_rows, {}, arrays, None))(arrays)
    np.testing.assert_allclose(out, xla_attention(*arrays, None), atol=1e-6)
    assert set(rows) == {2}


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": "full"}], ids=str)
def test_the_choice_reaches_the_layers(options, monkeypatch):
    used = []
    spied = lambda *x, **_: used.append(x) or xla_attention(*x)  # noqa: E731
    monkeypatch.setitem(attention.ATTENTIONS, "spied", spied)
    sizes = {"width": 12, "layers": 2, "heads": 3, "mlp_width": 20}
    tower = VisionTransformer(8, 4, **sizes, attention="spied", **options)
    jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert used


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that does not exist."""

    platform: str
    compute_capability: str = "9.0"


def machine(*devices):
    """Stands for a mesh of such devices."""
    return types.SimpleNamespace(devices=np.array(devices), size=len(devices))


@pytest.mark.parametrize(
    ("devices", "queries", "dtype", "chosen"),
    [
        ([Device("cpu")], 577, jnp.float32, "head_loop"),
        ([Device("cpu")], 577, jnp.bfloat16, "head_loop"),
        ([Device("cpu")], 30, jnp.float32, "xla"),
        ([Device("cpu")] * 2, 577, jnp.float32, "xla"),
        ([Device("tpu")] * 2, 577, jnp.bfloat16, "splash"),
        ([Device("tpu")] * 2, 577, jnp.float32, "xla"),
        ([Device("tpu")], 30, jnp.bfloat16, "xla"),
        ([Device("gpu")], 577, jnp.bfloat16, "cudnn"),
        ([Device("gpu")] * 2, 577, jnp.float16, "cudnn"),
        ([Device("gpu")], 577, jnp.float32, "xla"),
        ([Device("gpu", "7.0")], 577, jnp.bfloat16, "xla"),
        ([Device("gpu")], 1, jnp.bfloat16, "xla"),
    ],
)
def test_auto_looks_at_devices_dtype_and_length(devices, queries, dtype, chosen):
    assert resolve("auto", queries=queries, dtype=dtype, mesh=machine(*devices)) == chosen
    assert resolve("xla", queries=queries, dtype=dtype, mesh=machine(*devices)) == "xla"


def test_without_a_mesh_auto_looks_at_the_devices_that_are_here(monkeypatch):
    def chosen(*devices):
        monkeypatch.setattr(jax, "devices", lambda: list(devices))
        return resolve("auto", queries=577, dtype=jnp.bfloat16)

    assert resolve("auto", queries=577, dtype=jnp.float32) == "xla"  # eight in the tests
    assert chosen(Device("cpu")) == "head_loop"
    assert chosen(Device("tpu")) == "splash"
    # How a batch lies on several is not known.
    assert chosen(Device("tpu"), Device("tpu")) == "xla"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("cudnn", Device("tpu"), jnp.bfloat16, "'cudnn', which takes a GPU .*; this is tpu and bf"),
        (
            "splash",
            Device("cpu"),
            jnp.bfloat16,
            "'splash', which takes a TPU and bfloat16; this is",
        ),
        ("splash", Device("tpu"), jnp.float32, "this is tpu and float32; expected auto or xla"),
        ("cudnn", Device("gpu"), jnp.float32, "bfloat16 or float16; this is gpu and float32"),
        ("cudnn", Device("gpu", "7.5"), jnp.bfloat16, "a GPU of compute capability 8.0 or above"),
    ],
)
def test_what_cannot_run_there_is_refused(name, device, dtype, message):
    with pytest.raises(UserError, match=message):
        attend(*inputs(dtype=dtype), None, implementation=name, mesh=machine(device))


def test_pooling_and_causal_towers_ask_for_it():
    asked = []

    def spied(query, key, value, mask, *, causal):
        asked.append((query.shape[1], mask is None, causal))
        return xla_attention(query, key, value, mask, causal=causal)

    sizes = {"width": 12, "layers": 1, "heads": 3, "mlp_width": 20, "attention": "spied"}
    text = {"vocab_size": 9, "max_length": 5, "projection_dim": 4}
    ids = jnp.ones((2, 5), jnp.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention.ATTENTIONS, "spied", spied)
        for tower, given in (
            (ClipText(**sizes, **text, eos_token_id=2), (ids, ids)),
            (SiglipText(**sizes, **text), (ids,)),
            (SiglipVision(8, 4, **sizes), (jnp.zeros((2, 8, 8, 3)),)),
        ):
            jax.eval_shape(tower.init, jax.random.key(0), *given)
    assert asked == [(5, False, True), (5, True, False), (4, True, False), (1, True, False)]

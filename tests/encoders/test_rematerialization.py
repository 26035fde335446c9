"""What layers keep for their backward pass: the same gradients, of more or fewer computations."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ad_checkpoint

from fne_jax.encoders.attention import xla_attention
from fne_jax.encoders.fused_attention import splash_attention
from fne_jax.encoders.rematerialization import REMATS
from fne_jax.encoders.transformer import TransformerStack
from fne_jax.encoders.vision_transformer import VisionTransformer
from tests.support.parameters import drawn_parameters
from tests.support.programs import equations

LAYERS = 2
SIZES = {"width": 12, "layers": LAYERS, "heads": 3, "mlp_width": 20}


@functools.cache
def gradient(remat):
    """Returns a function of params that runs a tower forward and backward, and its params."""
    tower = VisionTransformer(8, 4, **SIZES, remat=remat, attention="xla")
    pixels = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    params = {"params": drawn_parameters(tower, pixels)}

    def loss(params):
        hidden = tower.apply(params, pixels).last_hidden_state
        return (hidden * jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape)).sum()

    return jax.jit(jax.grad(loss)), params


@pytest.mark.parametrize("remat", REMATS)
def test_gradients_are_the_same(remat):
    plain, params = gradient("none")
    other, _ = gradient(remat)
    for a, b in zip(*(jax.tree.leaves(g(params)) for g in (plain, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def products(remat):
    """Returns how often the gradient computes a product without and with a batch dimension."""
    run, params = gradient(remat)
    found = equations(jax.make_jaxpr(run)(params).jaxpr, "dot_general")
    return collections.Counter(bool(e.params["dimension_numbers"][1][0]) for e in found)


def test_fewer_products_are_computed_again_the_more_is_kept():
    kept = {remat: products(remat) for remat in REMATS}
    # In a layer six products of weights, and two of attention; the last of a layer has no use.
    assert kept["products"][False] == kept["none"][False]
    assert kept["products"][True] == kept["none"][True] + 2 * LAYERS
    assert kept["full"] == kept["attention"]  # nothing is fused here
    assert kept["full"][False] >= kept["none"][False] + 5 * LAYERS
    assert kept["full"][True] >= kept["none"][True] + 2 * LAYERS


@pytest.mark.parametrize(
    ("remat", "kept"), [("products", True), ("attention", True), ("full", False)]
)
def test_results_of_fused_attention_are_kept(remat, kept, capsys):
    options = {"heads": 3, "mlp_width": 20, "pre_norm": True, "norm_epsilon": 1e-6}
    stack = TransformerStack(LAYERS, options | {"attend": splash_attention}, remat=remat)
    hidden = jnp.ones((2, 5, 12))
    plain = stack.clone(layer_options=options | {"attend": xla_attention})
    params = jax.eval_shape(lambda key: plain.init(key, hidden, None, True), jax.random.key(0))
    ad_checkpoint.print_saved_residuals(
        lambda params: stack.apply(params, hidden, None, True).sum(), params
    )
    lines = capsys.readouterr().out.splitlines()
    # The mixture of 5 tokens padded to 128, and the sums of its softmax.
    for shape in ("f32[2,3,128,4]", "f32[2,3,128]"):
        found = [line for line in lines if line.startswith(f"{shape} ")]
        assert len(found) == LAYERS * kept

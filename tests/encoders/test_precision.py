"""float32 is float32 on every accelerator: the precision that each product asks for."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fne_jax.encoders.bert import Bert
from fne_jax.encoders.clip import ClipText, ClipVision
from fne_jax.encoders.dual_encoder import CHECKPOINT, DualEncoder
from fne_jax.encoders.siglip import SiglipText, SiglipVision
from fne_jax.encoders.transformer import cast_kernels
from fne_jax.encoders.vision_transformer import VisionTransformer
from tests.support.parameters import drawn_parameters
from tests.support.programs import equations

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def vit_and_bert(**options):
    towers = VisionTransformer(image_size=8, patch_size=4, **options), Bert(30, 9, **options)
    return DualEncoder(*towers)


def clip(**options):
    image = ClipVision(image_size=8, patch_size=4, projection_dim=6, **options)
    text = ClipText(vocab_size=30, max_length=9, projection_dim=6, eos_token_id=2, **options)
    return DualEncoder(image, text, CHECKPOINT, CHECKPOINT)


def siglip(**options):
    image = SiglipVision(image_size=8, patch_size=4, **options)
    text = SiglipText(vocab_size=30, max_length=9, projection_dim=12, **options)
    return DualEncoder(image, text, CHECKPOINT, CHECKPOINT, projection_dim=6)


def gradient_of(build, dtype, **options):
    """Returns a function of params that runs both towers forward and backward, and its params."""
    model = build(width=12, layers=1, heads=3, mlp_width=20, dtype=dtype, **options)
    inputs = jnp.zeros((2, 8, 8, 3)), jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), jnp.int32)

    def loss(params):
        image, text = model.apply(params, *inputs)
        return (image * text).sum()

    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return jax.grad(loss), params


OPTIONS = ({"attention": "xla"}, {"attention": "head_loop", "scan_layers": True, "remat": "full"})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("build", [vit_and_bert, clip, siglip])
def test_products_of_float32_keep_all_its_bits(build, options):
    for dtype in (jnp.float32, jnp.bfloat16):
        gradient, params = gradient_of(build, jnp.dtype(dtype), **options)
        jaxpr = jax.make_jaxpr(gradient)(params).jaxpr
        found = list(equations(jaxpr, "dot_general", "conv_general_dilated"))
        full = [all(x.aval.dtype == jnp.float32 for x in equation.invars) for equation in found]
        assert len(found) > 30 and all(full) == (dtype == jnp.float32)
        for equation, keeps_all in zip(found, full, strict=True):
            assert (equation.params["precision"] == HIGHEST) == keeps_all, equation


def test_the_compiled_program_asks_for_it():
    for dtype, asks in ((jnp.float32, True), (jnp.bfloat16, False)):
        gradient, params = gradient_of(vit_and_bert, dtype)
        text = jax.jit(gradient).lower(params).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert len(lines) > 30
        assert all(("HIGHEST, HIGHEST" in line) == asks for line in lines)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("build", [vit_and_bert, clip, siglip])
def test_kernels_cast_beforehand_change_no_bit(build, scan_layers):
    layers = 2 if scan_layers else 1
    sizes = {"width": 12, "layers": layers, "heads": 3, "mlp_width": 20}
    model = build(**sizes, dtype=jnp.bfloat16, scan_layers=scan_layers)
    rng = np.random.default_rng(4)
    pixels = jnp.asarray(rng.normal(size=(3, 8, 8, 3)), jnp.float32)
    ids = jnp.asarray(rng.integers(1, 30, (3, 5)), jnp.int32)
    inputs = pixels, ids, jnp.ones_like(ids)
    params = drawn_parameters(model, *inputs)
    cast = cast_kernels(params, jnp.bfloat16)
    dtypes = collections.Counter(str(leaf.dtype) for leaf in jax.tree.leaves(cast))
    assert dtypes["bfloat16"] == 2 * 6
    found, expected = (
        jax.jit(model.apply)({"params": weights}, *inputs) for weights in (cast, params)
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)

"""The towers: what they must not depend on, and options that must not change the result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fne_jax.configuration import with_model_defaults
from fne_jax.encoders.bert import Bert
from fne_jax.encoders.clip import ClipText, ClipVision
from fne_jax.encoders.dual_encoder import POOLINGS, DualEncoder, pool_mean
from fne_jax.encoders.towers import build_dual_encoder
from fne_jax.encoders.vision_transformer import VisionTransformer, flatten_patches
from fne_jax.errors import UserError
from tests.support.parameters import drawn_parameters

SIZES = {"width": 12, "layers": 2, "heads": 3, "mlp_width": 20}
ONE_LAYER = {**SIZES, "layers": 1}


@pytest.fixture(scope="module")
def pixels():
    return jax.random.normal(jax.random.key(0), (2, 12, 12, 3))


@pytest.fixture(scope="module")
def tokens():
    ids = jax.random.randint(jax.random.key(1), (3, 7), 1, 30)
    mask = jnp.arange(7)[None, :] < jnp.array([7, 4, 2])[:, None]
    return jnp.where(mask, ids, 0), mask.astype(jnp.int32)


def stacked(params, count=2):
    """Moves the parameters of layer_0, layer_1, ... into the layout of scanned layers."""
    layers = dict(params["encoder"])
    inner = jax.tree.map(lambda *x: jnp.stack(x), *(layers[f"layer_{i}"] for i in range(count)))
    return {**params, "encoder": {"layers": inner}}


TOWERS = {
    "image": lambda **options: VisionTransformer(12, 4, **SIZES, **options),
    "text": lambda **options: Bert(30, 9, **SIZES, **options),
}


@functools.partial(jax.jit, static_argnums=0)
def hidden_and_gradients(module, params, inputs):
    def total(params):
        hidden = module.apply({"params": params}, *inputs).last_hidden_state
        # Weighted, because a LayerNorm's output has a constant sum of squares.
        return (hidden * jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape)).sum(), hidden

    grads, hidden = jax.grad(total, has_aux=True)(params)
    return hidden, grads


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("scan_layers", "remat"), [(True, "none"), (False, "full"), (True, "products")], ids=str
)
def test_scan_and_remat_change_nothing(pixels, tokens, tower, scan_layers, remat):
    inputs = (pixels,) if tower == "image" else tokens
    plain, other = TOWERS[tower](), TOWERS[tower](scan_layers=scan_layers, remat=remat)
    params = drawn_parameters(plain, *inputs)
    arranged = stacked if scan_layers else lambda params: params
    hidden, grads = hidden_and_gradients(plain, params, inputs)
    hidden_other, grads_other = hidden_and_gradients(other, arranged(params), inputs)
    np.testing.assert_allclose(hidden, hidden_other, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        arranged(grads),
        grads_other,
    )


def test_text_embedding_does_not_depend_on_padding(tokens):
    ids, mask = (np.asarray(array) for array in tokens)
    text = Bert(30, 9, **ONE_LAYER)
    module = DualEncoder(image=VisionTransformer(12, 4, **ONE_LAYER), text=text)
    params = {"params": {"text": drawn_parameters(text, ids, mask)}}

    @functools.partial(jax.jit, static_argnums=2)
    def embed(ids, mask, pooling="mean"):
        other = module.clone(text_pooling=pooling)
        return other.apply(params, ids, mask, method="encode_text")

    batch = np.asarray(embed(ids, mask))
    np.testing.assert_allclose(batch[1], embed(ids[1:2, :4], mask[1:2, :4])[0], atol=1e-6)
    np.testing.assert_allclose(batch, embed(np.where(mask == 1, ids, 17), mask), atol=1e-6)
    with_padding = np.asarray(embed(ids, mask, "mean_with_padding"))
    assert not np.allclose(with_padding[2], batch[2], atol=1e-3)


def test_embeddings_are_unit_vectors_and_tell_inputs_apart(pixels, tokens):
    module = DualEncoder(
        image=VisionTransformer(12, 4, **ONE_LAYER), text=Bert(30, 9, **ONE_LAYER), projection_dim=5
    )
    params = drawn_parameters(module, pixels, *tokens)
    image, text = jax.jit(module.apply)({"params": params}, pixels, *tokens)
    assert image.shape == (2, 5) and text.shape == (3, 5)
    assert image.dtype == text.dtype == jnp.float32
    image, text = np.asarray(image), np.asarray(text)
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-5)
    assert not np.allclose(image[0], image[1], atol=1e-4)


def test_patches_are_in_reading_order():
    pixels = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = flatten_patches(pixels, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4], pixels[1, 2:4, 2:4].ravel())


def test_a_remainder_that_fills_no_patch_is_unseen():
    pixels = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    np.testing.assert_array_equal(flatten_patches(pixels, 2), flatten_patches(pixels[:, :4, :6], 2))


def test_a_tower_may_bring_its_own_pooling(pixels, tokens):
    module = DualEncoder(
        image=ClipVision(12, 4, **ONE_LAYER, projection_dim=5),
        text=ClipText(30, 9, **ONE_LAYER, projection_dim=5, eos_token_id=2),
        image_pooling="checkpoint",
        text_pooling="checkpoint",
    )
    params = drawn_parameters(module, pixels, *tokens)
    image, text = jax.jit(module.apply)({"params": params}, pixels, *tokens)
    assert image.shape == (2, 5) and text.shape == (3, 5)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
def test_the_last_layers_lie_beside_each_other(tower, scan, pixels, tokens):
    inputs = (pixels,) if tower == "image" else tokens
    three = TOWERS[tower](scan_layers=scan).clone(layers=3)
    params = drawn_parameters(three.clone(scan_layers=False), *inputs)

    def states(layers, **options):
        held = {f"layer_{index}": params["encoder"][f"layer_{index}"] for index in range(layers)}
        module = three.clone(layers=layers, scan_layers=False, **options)
        return module.apply({"params": {**params, "encoder": held}}, *inputs).last_hidden_state

    given = stacked(params, 3) if scan else params
    joined = three.clone(pooled_layers=2, remat="full").apply({"params": given}, *inputs)
    expected = np.concatenate([states(2), states(3)], axis=-1)
    np.testing.assert_allclose(joined.last_hidden_state, expected, atol=1e-5)
    pooled = POOLINGS["first_and_mean"](joined.last_hidden_state, jnp.ones(expected.shape[:2]))
    assert pooled.shape == (len(expected), 2 * 2 * SIZES["width"])


def test_mean_pooling_is_over_real_tokens():
    hidden = jnp.arange(24.0).reshape(2, 3, 4)
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(pool_mean(hidden, mask), [hidden[0, :2].mean(0), hidden[1, 0]])


def test_bfloat16_is_close_and_parameters_stay_float32(pixels):
    module = VisionTransformer(12, 4, **ONE_LAYER)
    out, params = jax.jit(module.init_with_output)(jax.random.key(0), pixels)
    half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(params, pixels).last_hidden_state
    assert half.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    full = out.last_hidden_state
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.06)


def test_dropout_is_off_unless_asked_for(pixels):
    module = VisionTransformer(12, 4, **ONE_LAYER, dropout=0.5)
    params = {"params": drawn_parameters(module, pixels)}
    out = jax.jit(module.apply)(params, pixels)
    apply = jax.jit(lambda rngs: module.apply(params, pixels, deterministic=not rngs, rngs=rngs))
    np.testing.assert_allclose(apply({}).last_hidden_state, out.last_hidden_state, atol=1e-5)
    dropped, again, other = (
        np.asarray(apply({"dropout": jax.random.key(seed)}).last_hidden_state) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(dropped, again)
    assert not np.allclose(dropped, out.last_hidden_state) and not np.allclose(dropped, other)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image.heads", 5, "encoder.image.width is 768, which 5 heads"),
        ("image.image_size", 100, "not a multiple of patch_size 16"),
        ("text.width", 384, "the towers' widths differ"),
        ("text.pooling", "checkpoint", r"no embedding of its own; expected one of mean, mean_w"),
        ("text.training_pooling", "checkpoint", "text.training_pooling is 'checkpoint', but that"),
        ("image.pooled_layers", 13, r"pooled_layers is 13; expected at most 12"),
        ("image.pooled_layers", 2, r"widths differ \(1536 and 768"),
    ],
)
def test_sizes_that_do_not_fit_are_named(field, value, message):
    from configs import base

    encoder = with_model_defaults(base.get_config(), architectures={}).encoder
    encoder.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        build_dual_encoder(encoder, 100)


def test_layers_that_are_pooled_lie_above_the_frozen_ones():
    from configs import base

    encoder = with_model_defaults(base.get_config(), architectures={}).encoder
    encoder.text.update(frozen_layers="10", pooled_layers=3)
    with pytest.raises(UserError, match=r"text.pooled_layers is 3; .* 2, .* that are not frozen"):
        build_dual_encoder(encoder, 100)

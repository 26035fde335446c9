"""The towers: what they must not depend on, and options that must not change the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fne_jax.configuration import with_model_defaults
from fne_jax.encoders.bert import Bert
from fne_jax.encoders.clip import ClipText, ClipVision
from fne_jax.encoders.dual_encoder import DualEncoder, pool_mean
from fne_jax.encoders.towers import build_dual_encoder
from fne_jax.encoders.vision_transformer import VisionTransformer, flatten_patches
from fne_jax.errors import UserError

SIZES = {"width": 12, "layers": 3, "heads": 3, "mlp_width": 20}


@pytest.fixture(scope="module")
def pixels():
    return jax.random.normal(jax.random.key(0), (2, 12, 12, 3))


@pytest.fixture(scope="module")
def tokens():
    ids = jax.random.randint(jax.random.key(1), (3, 7), 1, 30)
    mask = jnp.arange(7)[None, :] < jnp.array([7, 4, 2])[:, None]
    return jnp.where(mask, ids, 0), mask.astype(jnp.int32)


def stacked(params):
    """Moves the parameters of layer_0, layer_1, ... into the layout of scanned layers."""
    layers = dict(params["encoder"])
    inner = jax.tree.map(lambda *x: jnp.stack(x), *(layers[f"layer_{i}"] for i in range(3)))
    return {**params, "encoder": {"layers": inner}}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_scan_and_remat_change_nothing(pixels, tokens, scan_layers, remat):
    for build, inputs in (
        (lambda **o: VisionTransformer(12, 4, **SIZES, **o), (pixels,)),
        (lambda **o: Bert(30, 9, **SIZES, **o), tokens),
    ):
        plain, other = build(), build(scan_layers=scan_layers, remat=remat)
        params = plain.init(jax.random.key(2), *inputs)["params"]
        params_other = stacked(params) if scan_layers else params

        def total(params, module=plain, inputs=inputs):
            hidden = module.apply({"params": params}, *inputs).last_hidden_state
            # Weighted, because a LayerNorm's output has a constant sum of squares.
            return (hidden * jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape)).sum()

        np.testing.assert_allclose(
            plain.apply({"params": params}, *inputs).last_hidden_state,
            other.apply({"params": params_other}, *inputs).last_hidden_state,
            rtol=1e-4,
            atol=1e-5,
        )
        grads = jax.grad(total)(params)
        grads_other = jax.grad(lambda p, o=other, i=inputs: total(p, o, i))(params_other)
        expected = stacked(grads) if scan_layers else grads
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            expected,
            grads_other,
        )


def test_text_embedding_does_not_depend_on_padding(tokens):
    ids, mask = tokens
    text = Bert(30, 9, **SIZES)
    params = text.init(jax.random.key(0), ids, mask)
    module = DualEncoder(image=VisionTransformer(12, 4, **SIZES), text=text)
    params = module.init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)), ids, mask)

    def embed(ids, mask, **options):
        return module.clone(**options).apply(params, ids, mask, method="encode_text")

    np.testing.assert_allclose(
        embed(ids[1:2], mask[1:2])[0], embed(ids[1:2, :4], mask[1:2, :4])[0], atol=1e-6
    )
    np.testing.assert_allclose(
        embed(ids, mask), embed(jnp.where(mask == 1, ids, 17), mask), atol=1e-6
    )
    with_padding = embed(ids, mask, text_pooling="mean_with_padding")
    assert not np.allclose(with_padding[2], embed(ids, mask)[2], atol=1e-3)


def test_embeddings_are_unit_vectors_and_tell_inputs_apart(pixels, tokens):
    module = DualEncoder(
        image=VisionTransformer(12, 4, **SIZES), text=Bert(30, 9, **SIZES), projection_dim=5
    )
    params = module.init(jax.random.key(0), pixels, *tokens)
    image, text = module.apply(params, pixels, *tokens)
    assert image.shape == (2, 5) and text.shape == (3, 5)
    assert image.dtype == text.dtype == jnp.float32
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
        image=ClipVision(12, 4, **SIZES, projection_dim=5),
        text=ClipText(30, 9, **SIZES, projection_dim=5, eos_token_id=2),
        image_pooling="checkpoint",
        text_pooling="checkpoint",
    )
    params = module.init(jax.random.key(0), pixels, *tokens)
    image, text = module.apply(params, pixels, *tokens)
    assert image.shape == (2, 5) and text.shape == (3, 5)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-5)
    with pytest.raises(UserError, match="no embedding of its own; expected one of mean"):
        DualEncoder(VisionTransformer(12, 4, **SIZES), module.text, "checkpoint").init(
            jax.random.key(0), pixels, *tokens
        )


def test_an_unknown_activation_is_refused(pixels):
    module = VisionTransformer(12, 4, **SIZES, activation="relu")
    with pytest.raises(UserError, match="activation is 'relu'; expected one of gelu"):
        module.init(jax.random.key(0), pixels)


def test_mean_pooling_is_over_real_tokens():
    hidden = jnp.arange(24.0).reshape(2, 3, 4)
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(pool_mean(hidden, mask), [hidden[0, :2].mean(0), hidden[1, 0]])


def test_bfloat16_is_close_and_parameters_stay_float32(pixels):
    module = VisionTransformer(12, 4, **SIZES)
    params = module.init(jax.random.key(0), pixels)
    half = module.clone(dtype=jnp.bfloat16).apply(params, pixels).last_hidden_state
    assert half.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    full = module.apply(params, pixels).last_hidden_state
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.06)


def test_dropout_is_off_unless_asked_for(pixels):
    module = VisionTransformer(12, 4, **SIZES, dropout=0.5)
    params = module.init(jax.random.key(0), pixels)
    out = [module.apply(params, pixels).last_hidden_state for _ in range(2)]
    np.testing.assert_array_equal(*out)
    dropped = module.apply(
        params, pixels, deterministic=False, rngs={"dropout": jax.random.key(3)}
    ).last_hidden_state
    assert not np.allclose(dropped, out[0])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image.heads", 5, "encoder.image.width is 768, which 5 heads"),
        ("image.image_size", 100, "not a multiple of patch_size 16"),
        ("text.width", 384, "the towers' widths differ"),
        ("text.pooling", "max", "expected one of mean, mean_with_padding, mean_to_longest, first"),
        ("compute_dtype", "float16", "expected float32 or bfloat16"),
        (
            "attention",
            "flash",
            "config.encoder.attention is 'flash'; expected one of auto, xla, cudnn, head_loop",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(field, value, message):
    from configs import base

    encoder = with_model_defaults(base.get_config(), architectures={}).encoder
    encoder.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        build_dual_encoder(encoder, 100)

"""Encoders against PyTorch's figures for the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fne_jax import load_pretrained
from fne_jax.encoders.dual_encoder import POOLINGS, unit

TOLERANCE = 1e-5
# In bfloat16, whose steps near 1 are 0.008: last hidden states (of deviation about 1, after three
# layers), and embeddings of unit length.
HALF_TOLERANCE = {"hidden_state": 0.08, "emb": 0.01}


def embed(hidden):
    return unit(POOLINGS["mean_with_padding"](hidden, None))


def vit(module, params, pixels, tokens):
    hidden = module.apply({"params": params}, pixels).last_hidden_state
    return {"vit_last_hidden_state": hidden, "image_emb": embed(hidden)}


def dinov2(module, params, pixels, tokens):
    return {"last_hidden_state": module.apply({"params": params}, pixels).last_hidden_state}


def bert(module, params, pixels, tokens):
    hidden = module.apply({"params": params}, *tokens).last_hidden_state
    return {"bert_last_hidden_state": hidden, "text_emb_mean_with_padding": embed(hidden)}


def pair(module, params, pixels, tokens):
    image = module.image.apply({"params": params["image"]}, pixels)
    text = module.text.apply({"params": params["text"]}, *tokens)
    image_emb, text_emb = module.apply({"params": params}, pixels, *tokens)
    assert image.pooled.dtype == text.pooled.dtype == jnp.float32
    return {
        "vision_last_hidden_state": image.last_hidden_state,
        "text_last_hidden_state": text.last_hidden_state,
        "image_emb": image_emb,
        "text_emb": text_emb,
    }


MODELS = {
    "encoders/vit": ("encoders/encoders.npz", vit),
    "dinov2": ("dinov2/outputs.npz", dinov2),
    "encoders/bert": ("encoders/encoders.npz", bert),
    "clip": ("clip/outputs.npz", pair),
    "siglip": ("siglip/outputs.npz", pair),
}


def figures_and_ours(golden, model, **options):
    """Yields name, PyTorch's figure and ours."""
    file, run = MODELS[model]
    figures = np.load(golden / file)
    pixels = figures["pixel_values_nchw"].transpose(0, 2, 3, 1)
    tokens = figures.get("input_ids"), figures.get("attention_mask")
    module, params = load_pretrained(golden / model, **options)
    ours = jax.jit(lambda *inputs: run(module, *inputs))(params, pixels, tokens)
    for name, value in ours.items():
        yield name, figures[name], value


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": "full"}], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_agrees(golden, model, options):
    for name, figure, ours in figures_and_ours(golden, model, **options):
        np.testing.assert_allclose(ours, figure, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_close(golden, model):
    # Scanned, for one of the layers is compiled then instead of all.
    options = {"dtype": jnp.bfloat16, "scan_layers": True}
    for name, figure, ours in figures_and_ours(golden, model, **options):
        kind = "hidden_state" if name.endswith("hidden_state") else "emb"
        assert ours.dtype == (jnp.bfloat16 if kind == "hidden_state" else jnp.float32)
        np.testing.assert_allclose(
            ours.astype(jnp.float32), figure, atol=HALF_TOLERANCE[kind], rtol=0, err_msg=name
        )


def test_dinov2_agrees_at_another_image_size(golden):
    figures = np.load(golden / "dinov2/outputs.npz")
    module, params = load_pretrained(golden / "dinov2", image_size=30)
    pixels = figures["larger_pixel_values_nchw"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(
        module.apply({"params": params}, pixels).last_hidden_state,
        figures["larger_last_hidden_state"],
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )


def test_clip_reads_the_first_end_token_or_where_its_id_is_2_the_highest(golden):
    figures = np.load(golden / "clip/outputs.npz")
    module, params = load_pretrained(golden / "clip")
    ids, mask = figures["input_ids"], figures["attention_mask"]
    end = int(ids.max())
    middle = end // 2

    def run(eos_token_id, ids):
        text = module.text.clone(eos_token_id=eos_token_id)
        out = text.apply({"params": params["text"]}, ids, mask)
        np.testing.assert_allclose(
            out.last_hidden_state[:, :3], figures["text_last_hidden_state"][:, :3], atol=TOLERANCE
        )
        return out

    # The highest id of these texts is their end token.
    np.testing.assert_allclose(unit(run(2, ids).pooled), figures["text_emb"], atol=TOLERANCE)
    # A second end token, as where texts are padded with it, changes nothing.
    padded = np.where(mask, ids, end)
    np.testing.assert_allclose(unit(run(end, padded).pooled), figures["text_emb"], atol=TOLERANCE)
    # Token 2 itself has no part in the old rule; an end token that is not the highest has in the
    # new one.
    projection = params["text"]["projection"]["kernel"]
    for eos, place in ((2, 5), (middle, 4)):
        other = ids[:1].repeat(3, axis=0)
        other[:, 3:6] = (2, middle, end)
        other[:, 6:] = 1
        out = run(eos, np.concatenate([ids[:, :3], other[:, 3:]], axis=1))
        np.testing.assert_allclose(
            out.pooled, out.last_hidden_state[:, place] @ projection, atol=TOLERANCE
        )


def test_texts_without_a_mask_are_read_whole(golden):
    figures = np.load(golden / "siglip/outputs.npz")
    assert figures["attention_mask"].all()
    module, params = load_pretrained(golden / "siglip")
    out = module.text.apply({"params": params["text"]}, figures["input_ids"])
    np.testing.assert_allclose(unit(out.pooled), figures["text_emb"], atol=TOLERANCE)
    hiding = figures["attention_mask"].copy()
    hiding[:, 4:9] = 0
    masked = module.text.apply({"params": params["text"]}, figures["input_ids"], hiding)
    assert not np.allclose(masked.pooled, out.pooled, atol=1e-3)

    figures = np.load(golden / "clip/outputs.npz")
    module, params = load_pretrained(golden / "clip")
    out = module.text.apply({"params": params["text"]}, figures["input_ids"])
    # Causal, and padded at the end: the mask matters for padding only.
    np.testing.assert_allclose(unit(out.pooled), figures["text_emb"], atol=TOLERANCE)

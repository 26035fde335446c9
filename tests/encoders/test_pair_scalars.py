"""The temperature and the bias that a CLIP or SigLIP learned: followed, learned on, and saved."""

import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fne_jax import configuration
from fne_jax.conversion import export
from fne_jax.data import captions
from fne_jax.data.sources.registry import load_split
from fne_jax.encoders.towers import store_architectures
from fne_jax.errors import UserError
from fne_jax.model.model import pretrained_model
from fne_jax.objectives.learned_scalars import (
    BIAS_CHANGE,
    LEARNED,
    LOG_TEMPERATURE_FACTOR,
    log_factor_bounds,
)
from tests.support.tiny import tiny_config

SCALE, BIAS = 4.765, -12.9  # about those of siglip-base-patch16-224


def write_pair(folder, source, dtype=np.float32, **scalars):
    """Copies a golden pair with other scalars."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = load_file(source / "model.safetensors")
    for name, value in scalars.items():
        tensors[name] = np.full_like(tensors[name], value)
    tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def siglip(golden, tmp_path):
    return write_pair(tmp_path / "siglip", golden / "siglip", logit_scale=SCALE, logit_bias=BIAS)


def config_of(image, text=None, **fields):
    return tiny_config(
        encoder__image__pretrained=str(image),
        encoder__text__pretrained=str(text or image),
        encoder__image__image_size=32,
        **fields,
    )


def objective_of(*sources, **fields):
    objective = config_of(*sources, **fields).objective
    return objective.temperature, objective.bias


def test_an_objective_follows_the_pair(golden, tmp_path, siglip):
    followed = (pytest.approx(math.exp(-SCALE), rel=1e-6), pytest.approx(BIAS, rel=1e-6))
    assert objective_of(siglip) == objective_of(siglip, objective__name="sigmoid") == followed
    clip = write_pair(tmp_path / "clip", golden / "clip", logit_scale=4.6052)
    assert objective_of(clip) == (pytest.approx(0.01, rel=1e-4), -10.0)
    halved = write_pair(tmp_path / "half", golden / "clip", np.float16, logit_scale=4.6052)
    assert objective_of(halved, objective__learn_temperature=True)[0] == pytest.approx(0.01, 1e-3)


@pytest.mark.parametrize(
    "fields",
    [{"encoder__projection_dim": 4}, {"encoder__text__pooling": "mean"}, {"text": "clip"}],
    ids=str,
)
def test_other_embeddings_than_the_pairs_own_do_not(golden, siglip, fields):
    text = golden / fields.pop("text", siglip)
    assert objective_of(siglip, text, **fields) == (0.07, -10.0)
    # Its scale alone would drown the bias that sigmoid begins with.
    assert objective_of(golden / "clip", objective__name="sigmoid") == (0.07, -10.0)


def test_what_a_config_says_comes_first(siglip):
    assert objective_of(siglip, objective__temperature=0.2)[0] == 0.2
    assert objective_of(siglip, objective__bias=0.0)[1] == 0.0
    with pytest.raises(UserError, match=r"config.objective.temperature is 0.0005; with learn_"):
        config_of(siglip, objective__temperature=5e-4, objective__learn_temperature=True)


def test_a_run_keeps_them(siglip, tmp_path):
    config = tiny_config()
    for tower in ("image", "text"):
        config.encoder[tower].update(pretrained=str(siglip), pooling="auto")
    config.data.tokenizer = "auto"
    with config.unlocked():
        config.objective.update(temperature=0.0, bias=None)
    resolved, architectures = configuration.resolve(config)
    (tmp_path / "run").mkdir()
    store_architectures(architectures, tmp_path / "run")
    shutil.rmtree(siglip)
    again, _ = configuration.resolve(config, tmp_path / "run")
    assert again.objective == resolved.objective and again.objective.bias == pytest.approx(BIAS)


@pytest.mark.parametrize(
    ("start", "lowest"),
    [(0.07, 0.01), (0.00999999, 0.00999999), (0.00997, 0.00997), (0.0085, 1e-3)],
)
def test_what_begins_below_clips_bound_is_free(start, lowest):
    bounds = [start * math.exp(bound) for bound in log_factor_bounds(start)]
    assert bounds == pytest.approx([lowest, 1.0])


@pytest.mark.parametrize("learned", [None, (0.25, 1.5)])
def test_an_exported_pair_has_those_of_the_run(siglip, tmp_path, monkeypatch, learned):
    train = load_split(tiny_config().data, 8, "train")
    captions.fit_tokenizer(train.captions, 50).save_pretrained(tmp_path / "tokenizer")
    config = config_of(siglip, data__tokenizer=str(tmp_path / "tokenizer"))
    model = pretrained_model(config)
    scale, bias = SCALE, BIAS
    if learned:
        values = {
            LOG_TEMPERATURE_FACTOR: jnp.float32(learned[0]),
            BIAS_CHANGE: jnp.float32(learned[1]),
        }
        model = model.with_params(model.params | {LEARNED: values})
        scale, bias = SCALE - learned[0], BIAS + learned[1]
    monkeypatch.setattr(export, "load_workdir", lambda *_: model)
    export.export(tmp_path, "best", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(siglip / "model.safetensors")
    for name, value in (("logit_scale", scale), ("logit_bias", bias)):
        assert tensors[name].shape == source[name].shape
        np.testing.assert_allclose(tensors[name], value, rtol=1e-6)

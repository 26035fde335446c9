"""Pretrained towers in a run: named by the config, trained, restored, scored, used."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import fne_jax
from fne_jax import configuration, evaluate
from fne_jax.data import captions
from fne_jax.data.sources.registry import load_split
from fne_jax.encoders.towers import read_architectures
from fne_jax.errors import UserError
from fne_jax.evaluation.results import read_values
from fne_jax.model.model import build_model, build_module
from fne_jax.model.tokenizers import clean_captions
from fne_jax.parallel import sharding
from fne_jax.training import loop
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.timeline import Phase
from fne_jax.training.train_state import abstract_state, first_state
from tests.support.runs import training_of
from tests.support.tiny import tiny_config


def pretrained_config(image, text, **fields):
    return tiny_config(
        encoder__image__pretrained=str(image),
        encoder__text__pretrained=str(text),
        encoder__image__image_size=32,
        **fields,
    )


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A fitted tokenizer whose ids the small golden text towers all know."""
    train = load_split(tiny_config().data, 8, "train")
    tokenizer = captions.fit_tokenizer(train.captions, 50)
    assert len(tokenizer) <= 50
    folder = tmp_path_factory.mktemp("tokenizers") / "fitted"
    tokenizer.save_pretrained(folder)
    return folder


def test_what_a_config_leaves_open_follows_its_towers(golden):
    vit, bert = golden / "encoders" / "vit", golden / "encoders" / "bert"
    open_fields = {"data__tokenizer": "auto", "data__text_length": 0}
    plain = tiny_config(**open_fields)
    assert plain.data.tokenizer == "train" and plain.data.text_length == 30
    config = pretrained_config(vit, bert, **open_fields)
    assert config.encoder.image.pooling == config.encoder.text.pooling == "mean"
    assert config.data.text_length == 30 and config.data.tokenizer == str(bert)
    np.testing.assert_allclose(config.image_mean[0], 0.48145466)
    for name, mean in (("clip", 0.48145466), ("siglip", 0.5)):
        config = pretrained_config(golden / name, golden / name, **open_fields)
        assert config.encoder.image.pooling == config.encoder.text.pooling == "checkpoint"
        assert config.data.text_length == 16
        np.testing.assert_allclose(config.image_mean[0], mean)
    with pytest.raises(UserError, match=r"tokenizer is 'train', whose ids mean nothing to .*bert"):
        pretrained_config(vit, bert, data__tokenizer="train")
    config = pretrained_config(golden / "dinov2", bert, **open_fields)
    assert config.encoder.image.pooling == "mean" and config.image_std == (0.229, 0.224, 0.225)
    config = pretrained_config(
        vit, bert, image_mean=(0.1, 0.2, 0.3), encoder__image__pooling="first"
    )
    assert config.image_mean == (0.1, 0.2, 0.3) and config.encoder.image.pooling == "first"


@pytest.mark.parametrize(
    ("text", "settings", "cleaned"),
    [
        (None, None, "two people a mans dog"),
        ("encoders/bert", None, "two people a mans dog"),
        ("encoders/bert", {"do_lower_case": True}, "two people a mans dog"),
        ("encoders/bert", {"do_lower_case": False}, "Two people: a man's dog."),
        ("clip", None, "Two people: a man's dog."),
        ("siglip", {"do_lower_case": True}, "two people: a man's dog."),
    ],
)
def test_captions_are_cleaned_as_those_of_the_text_towers_training(
    golden, tmp_path, text, settings, cleaned
):
    fields = {}
    if text:
        shutil.copytree(golden / text, tmp_path / "text")
        fields = {"encoder__text__pretrained": str(tmp_path / "text")}
    if settings:
        (tmp_path / "text" / "tokenizer_config.json").write_text(json.dumps(settings))
    caption, many = "Two people: a man's dog.", "word " * 40
    config = tiny_config(**fields)
    short, long = clean_captions(config, [caption, many])
    assert short == cleaned and len(long.split()) == (30 if config.data.max_words else 40)
    assert (config.data.max_words == 30) == (config.data.cleaning == "authors")
    config = tiny_config(**fields, data__cleaning="none", data__max_words=4)
    assert clean_captions(config, [caption]) == ["Two people: a man's"]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_both_kinds_of_encoders_start_from_the_sources(golden, scan_layers):
    vit, bert = golden / "encoders" / "vit", golden / "encoders" / "bert"
    config = pretrained_config(vit, bert, encoder__scan_layers=scan_layers)
    architectures = read_architectures(config.encoder)
    module = build_module(config, architectures, 50)
    model = build_model(config, architectures, None, sharding.create_mesh(), module=module)
    like = abstract_state(model, learning_rate_schedule(config.optimizer, 3, 6))
    state = first_state(model, like)
    expected = {
        "image": fne_jax.load_pretrained(vit, scan_layers=scan_layers)[1],
        "text": fne_jax.load_pretrained(bert, scan_layers=scan_layers)[1],
    }
    jax.tree.map(np.testing.assert_array_equal, dict(state.params), expected)
    jax.tree.map(np.testing.assert_array_equal, dict(state.momentum_params), expected)


def test_a_dinov2_starts_from_its_source_at_another_size(golden):
    source = golden / "dinov2"
    config = tiny_config(
        encoder__image__pretrained=str(source),
        encoder__image__image_size=15,
        encoder__projection_dim=5,
    )
    architectures = read_architectures(config.encoder)
    module = build_module(config, architectures, 50)
    model = build_model(config, architectures, None, sharding.create_mesh(), module=module)
    state = first_state(
        model, abstract_state(model, learning_rate_schedule(config.optimizer, 3, 6))
    )
    expected = fne_jax.load_pretrained(source, image_size=15)[1]
    jax.tree.map(np.testing.assert_array_equal, dict(state.params["image"]), expected)


@pytest.mark.parametrize("pair", [True, False])
def test_no_state_holds_64_bits(golden, pair):
    images = {"encoder__image__pretrained": str(golden / ("siglip" if pair else "dinov2"))}
    if pair:
        fields = {"encoder__text__pretrained": images["encoder__image__pretrained"]}
        fields |= {"objective__learn_temperature": True, "objective__temperature": 0.1}
        fields |= {"encoder__image__image_size": 32}
    else:
        fields = {"encoder__image__image_size": 15, "encoder__projection_dim": 5}
        fields |= {"encoder__text__lora_rank": 2, "optimizer__layer_decay": 0.5}
    with jax.enable_x64(True):
        config = tiny_config(fne__start_epoch=0.0, **images, **fields)
        architectures = read_architectures(config.encoder)
        mesh = sharding.create_mesh(1, 1, jax.devices()[:1])
        training = training_of(config, build_module(config, architectures, 30), mesh, 3)
        tokens, ids = (
            jnp.zeros((16, config.data.text_length), jnp.int32),
            jnp.arange(16, dtype=jnp.int32),
        )
        side = config.encoder.image.image_size
        batch = {"image": jnp.zeros((16, side, side, 3), jnp.uint8), "input_ids": tokens}
        batch |= {"attention_mask": tokens + 1, "image_id": ids, "pair_id": ids}
        after = jax.eval_shape(training.steps[Phase.FNE], training.state, batch)
    for leaf in jax.tree.leaves((training.state, after)):
        assert leaf.dtype not in (np.float64, np.int64)


@pytest.mark.parametrize(
    ("image", "text", "fields", "message"),
    [
        ("encoders/bert", "encoders/bert", {}, "is of type bert, which has no image encoder"),
        ("encoders/vit", "encoders/vit", {}, "is of type vit, which has no text encoder"),
        ("encoders/vit", "clip", {}, r"widths differ \(48 and 32, "),
        ("encoders/vit", "encoders/bert", {"encoder__image__image_size": 30}, "not a multiple"),
        ("encoders/vit", "encoders/bert", {"data__text_length": 99}, "text_length is 99, more"),
        (
            "clip",
            "clip",
            {"encoder__image__pooling": "median"},
            "mean_to_longest, first, max, first_and_mean, checkpoint",
        ),
        ("nowhere", "clip", {}, "neither a local folder nor a model"),
    ],
)
def test_towers_that_do_not_fit_are_named(golden, image, text, fields, message):
    fields = {
        "encoder__image__image_size": 32,
        "encoder__image__pretrained": str(golden / image),
        "encoder__text__pretrained": str(golden / text),
    } | fields
    with pytest.raises(UserError, match=message):
        config = tiny_config(**fields)
        build_module(config, read_architectures(config.encoder), 50)


def test_captions_are_trained_as_what_they_are_evaluated_as(golden):
    fields = {"encoder__text__training_pooling": "checkpoint", "encoder__text__pooling": "mean"}
    config = pretrained_config(
        golden / "clip", golden / "clip", encoder__projection_dim=8, **fields
    )
    module = build_module(config, read_architectures(config.encoder), 30)
    with pytest.raises(UserError, match=r"training_pooling is 'checkpoint' and its pooling 'mean'"):
        training_of(config, module, sharding.create_mesh(), 3)


def test_a_tokenizer_of_another_vocabulary_is_refused(golden):
    config = pretrained_config(golden / "encoders" / "vit", golden / "encoders" / "bert")
    with pytest.raises(UserError, match="has 30000 token ids, more than"):
        build_module(config, read_architectures(config.encoder), 30_000)


@pytest.fixture(scope="module")
def trained(golden, tokenizer_folder, tmp_path_factory):
    """The workdir of a run that started from sources that are gone by now."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("vit", "bert"):
        shutil.copytree(golden / "encoders" / name, folder / name)
    config = pretrained_config(
        folder / "vit", folder / "bert", data__tokenizer=str(tokenizer_folder), num_epochs=1.0,
        fne__start_epoch=0.0, data__synthetic__images=20, data__text_length=8,
        encoder__scan_layers=True,  # compiles one of the three layers
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("runs") / "run"
    loop.train_and_evaluate(config, workdir)
    shutil.rmtree(folder)
    return workdir


@pytest.mark.slow
def test_a_run_is_restored_without_its_sources(trained):
    evaluate.main([f"--workdir={trained}", "--split=val"])
    assert "rsum" in json.loads((trained / "eval_val.json").read_text())["metrics"]


def test_a_run_resumes_without_its_sources(trained, caplog):
    config = configuration.read_config(trained)
    assert not pathlib.Path(config.encoder.image.pretrained).exists()
    with caplog.at_level("INFO", logger="fne_jax"):
        loop.train_and_evaluate(config, trained)
    assert "the run is complete" in caplog.text


def test_a_trained_model_embeds_what_it_is_given(trained, tmp_path):
    model = fne_jax.load_workdir(trained)
    val = load_split(model.config.data, 32, "val")
    image_emb = model.embed_images(list(val.images))
    text_emb = model.embed_texts(val.captions)
    np.testing.assert_allclose(np.linalg.norm(image_emb, axis=1), 1, rtol=1e-5)
    with jax.enable_x64(True):
        again = fne_jax.load_workdir(trained)
        for ours, wide in (
            (image_emb, again.embed_images(list(val.images))),
            (text_emb, again.embed_texts(val.captions)),
        ):
            assert wide.dtype == np.float32
            np.testing.assert_allclose(ours, wide, atol=1e-5)
    metrics = fne_jax.retrieval_metrics(image_emb, text_emb, val.caption_image)
    evaluate.main([f"--workdir={trained}", "--split=val"])
    stored = read_values(json.loads((trained / "eval_val.json").read_text()))
    assert metrics["rsum"] == pytest.approx(stored["rsum"])

    Image.fromarray(val.images[3]).save(tmp_path / "image.png")
    from_file = model.embed_images([tmp_path / "image.png"])
    from_bytes = model.embed_images([(tmp_path / "image.png").read_bytes()])
    np.testing.assert_array_equal(from_file, from_bytes)
    # A PNG goes through the quality at which `prepare` stores it.
    np.testing.assert_allclose(from_file[0], image_emb[3], atol=0.1)
    large = np.kron(val.images[3], np.ones((3, 2, 1), np.uint8))
    np.testing.assert_allclose(model.embed_images([large])[0], image_emb[3], atol=0.1)

    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xffnothing")
    with pytest.raises(UserError, match=r"broken.jpg': cannot be used as an image"):
        model.embed_images([tmp_path / "broken.jpg"])
    with pytest.raises(UserError, match=r"images\[1\]: expected uint8"):
        model.embed_images([val.images[0], np.zeros((4, 4, 3))])


def test_a_published_pair_is_scored_as_it_is(golden, tokenizer_folder, tmp_path, monkeypatch):
    # Of a config whose own encoders are others.
    (tmp_path / "config.py").write_text(
        "from tests.support.tiny import tiny_config\n\n"
        "def get_config():\n"
        "    return tiny_config(encoder__projection_dim=4, encoder__text__frozen_layers='all',\n"
        "                       encoder__image__pooling='first')\n"
    )
    models, original = [], evaluate.pretrained_model
    monkeypatch.setattr(
        evaluate, "pretrained_model", lambda config: models.append(original(config)) or models[-1]
    )
    arguments = [
        f"--model={golden / 'siglip'}",
        f"--config={tmp_path / 'config.py'}",
        f"--config.data.tokenizer={tokenizer_folder}",
        f"--out={tmp_path / 'scores.json'}",
    ]
    evaluate.main(arguments)
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["name"] == "siglip" and read_values(report)["rsum"] > 0
    (model,) = models
    assert model.config.image_mean == (0.5,) * 3 and model.config.data.text_length == 16
    module, params = fne_jax.load_pretrained(golden / "siglip")
    tokens = model.tokenize(["w1 w2", "w3"], 16)
    theirs = module.apply({"params": params}, *tokens, method="encode_text")
    np.testing.assert_allclose(model.embed_texts(["w1 w2", "w3"]), theirs, atol=1e-5)
    with pytest.raises(UserError, match=r"is of type vit; expected one of clip, siglip, which"):
        evaluate.main([f"--model={golden / 'trajectory' / 'vit'}", *arguments[1:]])
    with pytest.raises(UserError, match="give one of the --workdir"):
        evaluate.main(["--model=x", "--workdir=x"])
    with pytest.raises(UserError, match="--config goes with --model or --embeddings, not with --w"):
        evaluate.main(["--workdir=x", "--config=y"])

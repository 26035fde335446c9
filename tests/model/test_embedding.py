"""What a model embeds: single items and sequences of every kind, in batches that fit."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from fne_jax.data import captions
from fne_jax.data.images.usable_images import read_ahead
from fne_jax.errors import UserError
from fne_jax.model import tokenizers
from fne_jax.model.model import build_model, load_workdir
from fne_jax.parallel import sharding
from fne_jax.training import loop
from tests.support import TOP
from tests.support.tiny import LinearTowers, tiny_config


class Words:
    """Stands for a tokenizer: a word's id is its length."""

    def __call__(self, texts, max_length, **_):
        ids = np.zeros((len(texts), max_length), np.int64)
        for row, text in enumerate(texts):
            words = text.split()[:max_length]
            ids[row, : len(words)] = [len(word) for word in words]
        return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


@pytest.fixture(scope="module")
def model():
    module = LinearTowers()
    built = build_model(tiny_config(), {}, Words(), sharding.create_mesh(), module=module)
    zeros = np.zeros((1, 8, 8, 3)), np.zeros((1, 8), np.int32), np.ones((1, 8), np.int32)
    return built.with_params(module.init(jax.random.key(0), *zeros)["params"])


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 255, (70, 8, 8, 3)).astype(np.uint8)


@pytest.fixture
def file(tmp_path, pixels):
    path = tmp_path / "a.png"
    Image.fromarray(pixels[0]).save(path)
    return path


def test_one_sentence_is_one_row(model):
    one, several = model.embed_texts("a dog"), model.embed_texts(["a dog", "two small cats"])
    assert one.shape == (1, 16) and several.shape == (2, 16)
    np.testing.assert_allclose(one[0], several[0], atol=1e-6)
    np.testing.assert_array_equal(model.embed_texts(iter(["a dog", "two small cats"])), several)


def test_one_image_of_every_kind_is_one_row(model, file, pixels):
    with Image.open(file) as opened:
        forms = [file, str(file), file.read_bytes(), opened.copy(), pixels[0]]
    alone = [model.embed_images(form) for form in forms]
    assert {rows.shape for rows in alone} == {(1, 16)}
    together = model.embed_images(forms)
    np.testing.assert_allclose(np.concatenate(alone), together, atol=1e-6)
    # A file goes through the quality at which `prepare` stores it.
    np.testing.assert_allclose(together[:4], together[[0]].repeat(4, axis=0), atol=1e-6)


def test_nothing_is_no_row(model):
    for rows in (model.embed_texts([]), model.embed_images([]), model.embed_images(iter(()))):
        assert rows.shape == (0, 16) and rows.dtype == np.float32


def test_what_is_no_image_or_sentence_is_named(model, pixels):
    with pytest.raises(UserError, match=r"texts\[1\]: expected a str, got bytes"):
        model.embed_texts(["a dog", b"a cat"])
    with pytest.raises(UserError, match=r"texts\[0\]: expected a str, got bytes"):
        model.embed_texts(b"a cat")
    with pytest.raises(UserError, match=r"texts\[1\] is 'a.udcff', which has .* half a character"):
        model.embed_texts(["a dog", os.fsdecode(b"a\xff")])
    with pytest.raises(UserError, match=r"images\[2\]: expected a path, bytes, .* got int"):
        model.embed_images([pixels[0], pixels[1], 3])
    with pytest.raises(UserError, match=r"nowhere.jpg'?: cannot be read"):
        model.embed_images("nowhere.jpg")
    with pytest.raises(
        UserError, match="there is no user of that name, whose home folder ~no-such-user"
    ):
        model.embed_images("~no-such-user/a.jpg")


def test_batches_are_no_larger_than_they_must_be(model, pixels, monkeypatch):
    sizes = []
    to_devices = sharding.to_devices

    def watched(batch, mesh):
        sizes.append(len(batch["image"]))
        return to_devices(batch, mesh)

    monkeypatch.setattr(sharding, "to_devices", watched)
    expected = model.embed_images(pixels)
    assert sizes == [32, 32, 8]  # evaluation.batch_size, and a row for each of 8 devices
    for count in (1, 8, 9, 31):
        sizes.clear()
        rows = model.embed_images(pixels[:count])
        np.testing.assert_allclose(rows, expected[:count], atol=1e-6)
        assert sizes == [8 if count <= 8 else 32]


def test_images_are_read_in_bounded_memory(pixels):
    asked = []

    def images():
        for row in range(70):
            asked.append(row)
            yield pixels[row]

    batches = read_ahead(lambda image: image, images(), 32)
    assert len(next(batches)) == 32 and len(asked) == 64, "one batch is read ahead"
    assert [len(batch) for batch in batches] == [32, 6] and len(asked) == 70


def test_an_image_that_cannot_be_read_ends_the_readers(model, pixels):
    images = [pixels[0]] * 40 + [np.zeros(3)] + [pixels[0]] * 10**5
    with pytest.raises(UserError, match=r"images\[40\]"):
        model.embed_images(images)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("home") / "run"
    config = tiny_config(num_epochs=0.3, checkpoint__every_steps=1)
    loop.train_and_evaluate(config, workdir, module=LinearTowers())
    return workdir


def test_a_checkpoint_may_be_given_as_a_number(workdir, monkeypatch):
    models = (load_workdir(workdir, step, module=LinearTowers()) for step in (1, "2", "latest"))
    assert [model.step for model in models] == [1, 2, 2]
    monkeypatch.setenv("HOME", str(workdir.parent))
    with pytest.raises(UserError, match="there is no checkpoint '7'"):
        load_workdir("~/run", 7)


LOADING = """
import pathlib, sys
import jax
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
)
from fne_jax.model.model import load_workdir
from tests.support.tiny import LinearTowers
model = load_workdir(pathlib.Path(sys.argv[1]), module=LinearTowers())
print(len(compiled), "torch" in sys.modules, "tensorflow" in sys.modules)
"""


def test_loading_a_run_compiles_next_to_nothing_and_imports_no_other_framework(workdir):
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(workdir)],
        cwd=TOP, capture_output=True, text=True, check=True,
    )  # fmt: skip
    compiled, *imported = done.stdout.split()
    assert int(compiled) <= 3 and imported == ["False", "False"]


def test_a_stored_tokenizer_is_the_one_that_was_fitted(workdir):
    ours = tokenizers.stored_tokenizer(workdir)
    theirs = captions.load_tokenizer(str(workdir / "tokenizer"))
    texts = ["a red circle", "image 7 of many unknown words", ""]
    for found, expected in zip(
        captions.tokenize(ours, texts, 8), captions.tokenize(theirs, texts, 8), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert len(ours) == len(theirs)

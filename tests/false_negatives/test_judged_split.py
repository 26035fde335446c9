"""Embeddings are taken from where they were kept if, and only if, nothing has changed."""

import dataclasses

import jax
import numpy as np
import pytest

from fne_jax.false_negatives import judged_split
from fne_jax.model.model import build_model, initial_params, load_evaluation_split
from tests.support.runs import mesh_of
from tests.support.tiny import LinearTowers, tiny_config


@pytest.fixture(scope="module")
def made():
    config = tiny_config(data__synthetic__images=12)
    dataset = load_evaluation_split(config, "val")
    module = LinearTowers()
    model = build_model(config, {}, None, mesh_of(1), module=module)
    params, momentum = (
        initial_params(module, config, jax.random.key(seed))[0] for seed in range(2)
    )
    return dataclasses.replace(model.with_params(params), momentum_params=momentum), dataset


def test_what_is_kept_is_taken_while_nothing_changes(made, tmp_path, monkeypatch, caplog):
    model, dataset = made
    counted = []

    def tokenize(self, captions, length):
        counted.append(len(captions))
        ids = np.array([[len(text) % 40, ord(text[-1]) % 40] for text in captions], np.int32)
        return ids, np.ones_like(ids)

    monkeypatch.setattr(type(model), "tokenize", tokenize)
    path = tmp_path / "reviews" / "kept.npz"

    def embed(model=model, dataset=dataset):
        """Returns the embeddings, and whether they were made anew."""
        counted.clear()
        split = judged_split.embed(model, dataset, path)
        return [split.image_emb, split.text_emb, split.caption_bank], bool(counted)

    first, anew = embed()
    assert anew and not np.allclose(first[1], first[2])
    again, anew = embed()
    assert not anew
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other_captions = [text + "!" for text in dataset.captions]
    changed = {
        "step": {"model": dataclasses.replace(model, step=3)},
        "weights": {"model": model.with_params(model.momentum_params)},
        "momentum weights": {"model": dataclasses.replace(model, momentum_params=model.params)},
        "captions": {"dataset": dataclasses.replace(dataset, captions=other_captions)},
        "images": {"dataset": dataclasses.replace(dataset, images=255 - dataset.images)},
    }
    for what, values in changed.items():
        assert embed(**values)[1], what
        assert not embed(**values)[1], what
    embed()
    for damage in (b"", b"nothing", path.read_bytes()[:-200]):
        path.write_bytes(damage)
        caplog.clear()
        assert embed()[1] and "cannot be read, so everything is embedded again" in caplog.text
        assert not embed()[1]


def test_a_folder_that_cannot_be_written_costs_a_warning(made, tmp_path, monkeypatch, caplog):
    model, dataset = made
    monkeypatch.setattr(
        type(model), "tokenize", lambda self, texts, length: (np.ones((len(texts), 2), int),) * 2
    )
    (tmp_path / "reviews").write_text("a file")
    judged_split.embed(model, dataset, tmp_path / "reviews" / "kept.npz")
    assert "will be embedded again" in caplog.text

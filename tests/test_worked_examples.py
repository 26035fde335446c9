"""The worked examples of docs/architecture.md, built as a reader would: they work."""

import importlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import fne_jax
from fne_jax.encoders import model_types, pretrained_weights
from fne_jax.encoders.architectures import build_from_architecture
from fne_jax.errors import UserError
from fne_jax.objectives.features import Features
from tests.support import TOP, pages_of_docs
from tests.support.sources import jpeg
from tests.support.tiny import tiny_config

PAGE = "architecture.md"


@pytest.fixture
def follow(monkeypatch):
    """Returns a function that follows an example, and returns the modules by their files' names."""

    def follow(heading):
        text = pages_of_docs.section(PAGE, heading)
        blocks = [
            block
            for block in pages_of_docs.blocks(TOP / "docs" / PAGE)
            if block.title and block.code in text
        ]
        assert 2 <= len(blocks) <= 3
        modules = {}
        for block in blocks:
            name = block.title.removesuffix(".py").replace("/", ".")
            source = block.code
            if block.language == "diff":
                source = pages_of_docs.patched((TOP / block.title).read_text("utf-8"), source)
                name += "_changed"  # the package's own stays as it is
            module = modules[block.title.rpartition("/")[2]] = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            exec(compile(source, block.title, "exec"), vars(module))
        return modules

    return follow


def test_every_example_is_followed():
    headings = re.findall(r"^### (An? .*)$", (TOP / "docs" / PAGE).read_text("utf-8"), re.MULTILINE)
    assert headings == [
        "An objective: soft-margin triplets",
        "A source: captions in file names",
        "An encoder: ELECTRA",
    ]


def test_the_objective(follow):
    registry = follow("### An objective: soft-margin triplets")["registry.py"]
    config = ml_collections.ConfigDict(tiny_config().to_dict())
    config.objective.name = "soft_margin"
    config.objective.temperature = 0.1
    objective = registry.main_objective(config)
    assert "objective.temperature" in registry.fields_after_warmup(config)

    rng = np.random.default_rng(0)
    image, text = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(2, 5, 3))
    )
    image_id = np.array([0, 1, 2, 1, 3])  # pairs 1 and 3 show one image
    same_image = image_id[:, None] == image_id

    def loss(image, text):
        features = Features(image, text, image, text, image_id, same_image=same_image)
        return objective(features, None, None, jax.random.key(0))[0]

    expected = 0.0
    for anchors, keys in ((image, text), (text, image)):
        for row in range(5):
            others = [key for key in range(5) if image_id[key] != image_id[row]]
            hardest = max(anchors[row] @ keys[key] for key in others)
            gap = (hardest - anchors[row] @ keys[row]) / 0.1
            expected += np.log1p(np.exp(gap)) / 5 / 2
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(jnp.array(image), jnp.array(text))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(gradient).all() and gradient.any() for gradient in gradients)


def test_the_source(follow, tmp_path):
    source = follow("### A source: captions in file names")["registry.py"].find_source("file_names")
    for split, names in (("train", "ba"), ("val", "c"), ("test", "d")):
        (tmp_path / split).mkdir()
        for name in names:
            (tmp_path / split / f"a {name}.jpg").write_bytes(jpeg())
    data = ml_collections.ConfigDict({"dir": str(tmp_path)})
    images = source.read(data).images
    assert [image.split for image in images] == ["train", "train", "val", "test"]
    assert [image.captions for image in images] == [["a a"], ["a b"], ["a c"], ["a d"]]
    assert [image.image_id for image in images] == [0, 1, 2, 3]
    (tmp_path / "train" / "a a.jpg").unlink()
    (tmp_path / "train" / "a b.jpg").unlink()
    with pytest.raises(UserError, match="no image of the split 'train'"):
        source.read(data)


@pytest.fixture
def electra(follow, monkeypatch):
    """Lets the package know ELECTRA, as the example says; returns a tiny one's config.json."""
    modules = follow("### An encoder: ELECTRA")
    monkeypatch.setitem(model_types.MODELS, "electra", modules["model_types.py"].MODELS["electra"])
    monkeypatch.setattr(pretrained_weights, "IGNORED", modules["layouts.py"].IGNORED)
    return {
        "model_type": "electra",
        "vocab_size": 30,
        "embedding_size": 6,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 9,
    }


def test_the_encoder_is_built_from_its_config(electra):
    module = build_from_architecture(electra, "config.json")
    ids = jnp.ones((2, 7), int)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    assert shapes["word_embedding"].shape == (30, 6)
    assert shapes["embedding_projection"]["kernel"].shape == (6, 8)


@pytest.mark.slow
def test_the_encoder_agrees_with_transformers(electra, tmp_path):
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    theirs = transformers.ElectraForPreTraining(transformers.ElectraConfig(**electra)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ids = np.array([[5, 7, 9, 11], [6, 8, 0, 0]])
    mask = (ids != 0).astype(int)
    with torch.no_grad():
        expected = theirs.electra(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    module, params = fne_jax.load_pretrained(tmp_path / "theirs")
    assert type(module).__name__ == "Electra"
    hidden = module.apply({"params": params}, jnp.array(ids), jnp.array(mask)).last_hidden_state
    np.testing.assert_allclose(
        np.where(mask[..., None], hidden, 0), np.where(mask[..., None], expected, 0), atol=2e-6
    )
    fne_jax.save_pretrained(tmp_path / "ours", module, params)
    jax.tree.map(
        np.testing.assert_array_equal, params, fne_jax.load_pretrained(tmp_path / "ours")[1]
    )

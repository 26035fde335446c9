"""Frozen layers: not trained, run once a step, and kept on disk if asked."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fne_jax import configuration, files
from fne_jax.data.batches import BatchOrder
from fne_jax.data.sources.registry import load_split
from fne_jax.encoders import freezing
from fne_jax.encoders.dual_encoder import POOLINGS, Projection
from fne_jax.encoders.low_rank import LowRankDense, merge_factors
from fne_jax.encoders.towers import build_dual_encoder
from fne_jax.encoders.transformer import TransformerLayer
from fne_jax.errors import UserError
from fne_jax.false_negatives.judged_split import caption_bank
from fne_jax.model import checkpoints, kept_features
from fne_jax.model.model import build_model, load_workdir
from fne_jax.parallel import sharding
from fne_jax.training import loop
from fne_jax.training.optimizer import learning_rate_factors
from fne_jax.training.timeline import Phase
from fne_jax.training.train_state import abstract_state
from tests.support import TOP
from tests.support.ports import free_port
from tests.support.runs import mesh_of, new_state, stored_state, training_of
from tests.support.tiny import tiny_config
from tests.support.xla_flags import xla_flags

THREE = {"encoder__image__layers": 3, "encoder__text__layers": 2, "encoder__projection_dim": 12}
LOWER = {"encoder__image__frozen_layers": "2", "encoder__text__frozen_layers": "1"}
PLAIN_IMAGES = {"data__augmentation": "none"}


def names_of(tree):
    return {"/".join(path) for path in freezing.flatten(tree)}


def batch_of(config):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 30, (16, 8), np.int32)
    return {
        "image": rng.integers(0, 256, (16, 8, 8, 3), np.uint8),
        "input_ids": tokens,
        "attention_mask": (np.arange(8) < rng.integers(2, 9, (16, 1))).astype(np.int32),
        "image_id": np.arange(16, dtype=np.int32),
        "pair_id": np.arange(16, dtype=np.int32),
    }


def stepped(config, mesh, steps=2):
    """Returns the states before and after a few FNE steps on one batch, and the last scalars."""
    module = build_dual_encoder(config.encoder, 30, mesh=mesh)
    training = training_of(config, module, mesh, 7, 0.01)
    start, state = new_state(training), new_state(training)
    step = training.steps[Phase.FNE]
    batch = sharding.to_devices(batch_of(config), mesh)
    for _ in range(steps):
        state, scalars, _ = step(state, batch)
    return start, state, scalars


@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameters_are_parted_by_layer(scan_layers):
    config = tiny_config(encoder__scan_layers=scan_layers, **THREE, **LOWER)
    model = build_model(config, {}, None, mesh_of(1), module=build_dual_encoder(config.encoder, 30))
    state = abstract_state(model, optax.constant_schedule(0.0))
    stack = {"image/encoder", "text/encoder"}
    layers = {
        False: (
            {"image/encoder/layer_0", "image/encoder/layer_1", "text/encoder/layer_0"},
            {"image/encoder/layer_2", "text/encoder/layer_1"},
        ),
        True: (
            {f"{one}/frozen_layers" for one in stack},
            {f"{one}/layers" for one in stack},
        ),
    }[scan_layers]

    def heads(tree):
        return {"/".join(n.split("/")[: 3 if "/encoder/" in n else 2]) for n in names_of(tree)}

    embeddings = {
        "image/class_token",
        "image/patch_embedding",
        "image/position_embedding",
        "text/embedding_norm",
        "text/position_embedding",
        "text/segment_embedding",
        "text/word_embedding",
    }
    after = {"image/final_norm", "image_projection/kernel", "text_projection/kernel"}
    assert heads(state.frozen_params) == layers[0] | embeddings
    assert heads(state.params) == layers[1] | after
    assert names_of(state.momentum_params) == names_of(state.params)
    moments = [s for s in jax.tree.leaves(state.opt_state) if s.ndim]
    assert sum(s.size for s in moments) == 2 * sum(s.size for s in jax.tree.leaves(state.params))


def test_whole_towers_and_low_rank_changes_are_parted():
    config = tiny_config(**THREE, encoder__image__frozen_layers="all", encoder__text__lora_rank=2)
    module = build_dual_encoder(config.encoder, 30)
    batch = batch_of(config)
    params = jax.eval_shape(
        module.init,
        jax.random.key(0),
        jnp.zeros((1, 8, 8, 3)),
        batch["input_ids"],
        batch["input_ids"],
    )["params"]
    trained, frozen = freezing.trained_and_frozen(module, params)
    assert all(
        n.endswith(("lora_in", "lora_out")) or "_projection/" in n for n in names_of(trained)
    )
    assert "text/encoder/layer_1/mlp_in/lora_out" in names_of(trained)
    assert {n for n in names_of(params) if n.startswith("image/")} <= names_of(frozen)
    assert jax.tree.structure(freezing.merge(trained, frozen)) == jax.tree.structure(dict(params))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_trained_gets_the_gradient_that_it_gets_with_nothing_frozen(parts):
    # SGD: with Adam's moments a difference of rounding would show.
    fields = {"optimizer__eps": 1.0, "optimizer__clip_norm": 1e6, "micro_batches": parts, **THREE}
    plain_start, plain, plain_scalars = stepped(tiny_config(**fields), mesh_of(1), 1)
    start, state, scalars = stepped(tiny_config(**fields, **LOWER), mesh_of(1), 1)
    jax.tree.map(np.testing.assert_array_equal, state.frozen_params, start.frozen_params)
    jax.tree.map(np.testing.assert_array_equal, start.all_params, plain_start.params)
    np.testing.assert_allclose(scalars["loss"], plain_scalars["loss"], rtol=1e-5)
    moved = freezing.flatten(state.params)
    for path, expected in freezing.flatten(plain.params).items():
        if path in moved:
            np.testing.assert_allclose(moved[path], expected, rtol=1e-5, atol=1e-6)
            assert (moved[path] != freezing.flatten(start.params)[path]).any(), path


@pytest.mark.slow
def test_devices_agree():
    fields = {"optimizer__eps": 1.0, "encoder__text__lora_rank": 2, **THREE, **LOWER}
    _, one, _ = stepped(tiny_config(**fields), mesh_of(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
        _, many, _ = stepped(tiny_config(**fields), mesh_of(4, 2))
    split = [leaf for leaf in jax.tree.leaves(many.frozen_params) if leaf.size >= 64]
    assert len(split) > 16
    assert all(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in split)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        many.all_params,
        one.all_params,
    )


def trained(tmp_path, name, **fields):
    """Returns the state at the end of a run of two epochs, whose data is kept in `cache`."""
    config = tiny_config(
        data__cache_dir=str(tmp_path / "cache"), fne__start_epoch=1.0, **PLAIN_IMAGES, **fields
    )
    loop.train_and_evaluate(config, tmp_path / name)
    return stored_state(tmp_path / name)


def bits(state):
    return checkpoints.fingerprints(state.stored())


@pytest.mark.parametrize(
    "fields",
    [
        {**THREE, **LOWER},
        {
            **THREE,
            "encoder__image__frozen_layers": "all",
            "encoder__image__pooled_layers": 2,
            "encoder__text__frozen_layers": "2",
            "encoder__scan_layers": True,
            "encoder__projection_hidden": 20,
            "micro_batches": 2,
        },
    ],
    ids=["lower layers", "all, in micro-batches"],
)
@pytest.mark.slow
def test_a_run_on_kept_features_is_bit_identical(tmp_path, fields):
    plain = trained(tmp_path, "plain", **fields)
    assert not (tmp_path / "cache" / "frozen").exists()
    kept = trained(tmp_path, "kept", data__keep_frozen=True, **fields)
    assert bits(kept) == bits(plain)

    # Training and validation split, images and captions.
    folders = sorted((tmp_path / "cache" / "frozen").glob("*-*[!k]"))
    assert [f.name.partition("-")[0] for f in folders] == ["image"] * 2 + ["text"] * 2
    written = {f: f.stat().st_mtime_ns for folder in folders for f in folder.iterdir()}
    # Evaluation reads what is there, and embeds as without it.
    model, other = (load_workdir(tmp_path / name, "latest") for name in ("kept", "plain"))
    val = model.load_split("val")
    mine, theirs = model.embed_split(val), other.embed_split(val)
    np.testing.assert_array_equal(mine.image_emb, theirs.image_emb)
    np.testing.assert_array_equal(mine.text_emb, theirs.text_emb)
    # Nor by the momentum encoder, which has the frozen part of the other.
    passes, of_texts = [], model.embedder._texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model.embedder, "_texts", lambda *given: passes.append(given[-1]) or of_texts(*given)
        )
        bank = caption_bank(model, val)
    assert passes[0] is not None
    np.testing.assert_array_equal(bank, caption_bank(other, val))
    assert {f: f.stat().st_mtime_ns for folder in folders for f in folder.iterdir()} == written
    # New images and texts go through all layers.
    np.testing.assert_allclose(
        model.embed_images(val.images[:3]), mine.image_emb[:3], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        model.embed_texts(val.captions[:3]), mine.text_emb[:3], rtol=1e-5, atol=1e-6
    )


def test_kept_features_are_of_their_weights_their_data_and_their_program(tmp_path, monkeypatch):
    fields = {
        "encoder__image__frozen_layers": "1",
        "data__keep_frozen": True,
        "data__cache_dir": str(tmp_path),
        **PLAIN_IMAGES,
    }

    def kept(seed=0, batch=16, change=lambda split: split, **more):
        config = tiny_config(seed=seed, global_batch_size=batch, **fields | more)
        mesh = mesh_of(1)
        module = build_dual_encoder(config.encoder, 30, mesh=mesh)
        training = training_of(config, module, mesh, 7)
        model = training.model.with_params(new_state(training).all_params)
        train = change(load_split(config.data, 8, "train"))
        tokens = np.ones((2, len(train.captions), 8), np.int32)
        rows = model.with_kept(train, tuple(tokens), training=True).kept["image"]
        batches = list(model.embedder.frozen_rows("image", model.params, train, tokens, batch))
        np.testing.assert_array_equal(rows[np.arange(len(rows))], np.concatenate(batches))
        return {path.name for path in tmp_path.glob("frozen/image-*") if not path.suffix}

    first = kept()
    assert len(first) == 1 and kept() == first
    # A run that waited for another one finds there what it was about to compute.
    reads, read_rows = [], kept_features.read_rows
    with monkeypatch.context() as patch:
        patch.setattr(
            kept_features,
            "read_rows",
            lambda *given: reads.append(given) or (read_rows(*given) if len(reads) > 1 else None),
        )
        patch.setattr(kept_features, "_write", None)
        assert kept() == first and len(reads) == 2
    # What killed runs left is removed, unless its lock tells of a run that goes on.
    killed, going_on = (tmp_path / "frozen" / name for name in ("text-0", "text-1"))
    leftovers = [path.with_name(f"{path.name}.12345678.incomplete") for path in (killed, going_on)]
    for leftover in leftovers:
        leftover.mkdir()
    killed.with_suffix(".lock").touch()
    for other in (
        {"seed": 1},
        {"batch": 8},
        {"data__synthetic__seed": 1},
        {"data__resize_to": 6},
        {"image_mean": (0.4, 0.5, 0.6)},
    ):
        with files.locked(going_on.with_suffix(".lock"), lambda holder: None, ""):
            more = kept(**other)
        assert len(more) == len(first) + 1
        first = more
    assert [leftover.exists() for leftover in leftovers] == [False, True]

    for path in tmp_path.glob("frozen/*/values.bin"):
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"is damaged.*delete that folder"):
        kept()


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(tmp_path):
    fields = {**THREE, **LOWER, "data__keep_frozen": True}
    whole = trained(tmp_path, "whole", **fields)
    for epochs in (1.0, 2.0):
        config = tiny_config(
            data__cache_dir=str(tmp_path / "cache"),
            fne__start_epoch=1.0,
            **PLAIN_IMAGES,
            **fields,
        )
        loop.train_and_evaluate(config, tmp_path / "parts", warmup_only=epochs == 1.0)
    assert bits(stored_state(tmp_path / "parts")) == bits(whole)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_one_that_froze_less(tmp_path):
    source = trained(tmp_path, "source", **THREE)
    config = tiny_config(
        init_from=str(tmp_path / "source"), encoder__text__lora_rank=2, **THREE, **LOWER
    )
    loop.train_and_evaluate(config, tmp_path / "next")
    state = stored_state(tmp_path / "next")
    best = stored_state(tmp_path / "source", "best")
    assert int(source.step) == int(state.step)
    theirs = freezing.flatten(best.params)
    for path, leaf in freezing.flatten(state.frozen_params).items():
        np.testing.assert_array_equal(leaf, theirs[path])


# Low-rank changes.


def test_low_rank_changes_are_those_of_a_changed_kernel():
    x = jax.random.normal(jax.random.key(0), (5, 7))
    layer = LowRankDense(3, rank=2, precision="highest")
    params = layer.init(jax.random.key(1), x)["params"]
    np.testing.assert_allclose(
        layer.apply({"params": params}, x), x @ params["kernel"] + params["bias"][None], rtol=1e-5
    )
    params["lora_out"] = jax.random.normal(jax.random.key(2), (2, 3))
    changed = params["kernel"] + params["lora_in"] @ params["lora_out"]
    np.testing.assert_allclose(
        layer.apply({"params": params}, x), x @ changed + params["bias"][None], rtol=1e-4, atol=1e-5
    )
    merged = merge_factors({"a": {"b": params}, "c": jnp.ones(2)})
    assert names_of(merged) == {"a/b/kernel", "a/b/bias", "c"}
    np.testing.assert_allclose(merged["a"]["b"]["kernel"], changed, rtol=1e-5, atol=1e-6)


def test_a_layer_with_merged_changes_gives_the_same():
    sizes = {"heads": 2, "mlp_width": 10, "pre_norm": True, "norm_epsilon": 1e-6}
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 8))
    layer = TransformerLayer(**sizes, lora_rank=3)
    params = layer.init(jax.random.key(1), hidden, None, True)["params"]
    keys = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    out, _ = layer.apply({"params": params}, hidden, None, True)
    plain, _ = TransformerLayer(**sizes).apply(
        {"params": merge_factors(params)}, hidden, None, True
    )
    np.testing.assert_allclose(out, plain, rtol=1e-4, atol=1e-5)


# Factors on the learning rate.


@pytest.mark.parametrize("scan_layers", [False, True])
def test_lower_layers_learn_slower(scan_layers):
    rates = {"optimizer__image_factor": 2.0, "optimizer__layer_decay": 0.5}
    config = tiny_config(encoder__scan_layers=scan_layers, **rates, **THREE)
    module = build_dual_encoder(config.encoder, 30)
    tokens = jnp.ones((1, 8), jnp.int32)
    params = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), tokens, tokens
    )["params"]
    factors = learning_rate_factors(config.optimizer, module, params)
    shapes = jax.tree.map(
        lambda f, p: jnp.broadcast_shapes(f.shape, p.shape) == p.shape, factors, params
    )
    assert all(jax.tree.leaves(shapes))
    image = factors["image"]
    kernels = (
        image["encoder"]["layers"]["mlp_in"]["kernel"].reshape(-1)
        if scan_layers
        else [image["encoder"][f"layer_{n}"]["mlp_in"]["kernel"] for n in range(3)]
    )
    np.testing.assert_allclose(kernels, [2 * 0.5**3, 2 * 0.5**2, 2 * 0.5])
    np.testing.assert_allclose(image["class_token"], 2 * 0.5**4)
    np.testing.assert_allclose(image["final_norm"]["scale"], 2)
    np.testing.assert_allclose(factors["image_projection"]["kernel"], 2)
    np.testing.assert_allclose(factors["text"]["word_embedding"], 0.5**3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"encoder__image__frozen_layers": "half"},
            r"'half'; expected \"none\", \"all\", or a num",
        ),
        (
            {"encoder__image__frozen_layers": "all", "encoder__text__frozen_layers": "all"},
            "there is nothing to train",
        ),
        ({"encoder__projection_hidden": 4}, "projection_dim is 0: there is no projection"),
        (
            {"encoder__image__frozen_layers": "all", "encoder__image__lora_rank": 2},
            "with which no layer is changed",
        ),
        ({"data__keep_frozen": True}, "there is nothing to keep"),
        (
            {"data__keep_frozen": True, "encoder__image__frozen_layers": "1"},
            "with config.data.augmentation=crop_flip",
        ),
        (
            {
                "data__keep_frozen": True,
                "encoder__text__frozen_layers": "1",
                "encoder__text__training_pooling": "mean_to_longest",
            },
            "captions are pooled in one way",
        ),
        ({"optimizer__image_factor": 0.0}, "image_factor is 0.0; expected a number from"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        configuration.validate(tiny_config(**fields))


def test_more_layers_than_there_are_cannot_be_frozen():
    with pytest.raises(UserError, match=r"text.frozen_layers is '2'; expected at most 1"):
        tiny_config(encoder__text__frozen_layers="2")


@pytest.mark.slow
def test_augmented_images_are_not_kept_but_captions_are(tmp_path):
    config = tiny_config(
        data__keep_frozen=True,
        data__cache_dir=str(tmp_path / "cache"),
        num_epochs=1.0,
        **THREE,
        **LOWER,
    )
    loop.train_and_evaluate(config, tmp_path / "run")
    names = sorted(f.name.partition("-")[0] for f in tmp_path.glob("cache/frozen/*-*[!k]"))
    # The validation split's images are not augmented.
    assert names == ["image", "text", "text"]
    assert BatchOrder(0, 120, 16).steps_per_epoch == int(stored_state(tmp_path / "run").step)


def test_a_class_token_is_pooled_beside_the_mean_of_the_others():
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 3))
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    pooled = POOLINGS["first_and_mean"](hidden, mask)
    expected = [
        np.concatenate([row[0], row[1 : 1 + others].mean(axis=0)])
        for row, others in zip(np.asarray(hidden), (2, 4), strict=True)
    ]
    np.testing.assert_allclose(pooled, expected, rtol=1e-6)
    config = tiny_config(encoder__image__pooling="first_and_mean")
    with pytest.raises(UserError, match=r"32 and 16, .*image.pooling=first_and_mean"):
        build_dual_encoder(config.encoder, 30)


def test_a_projection_may_have_a_hidden_layer():
    x = jax.random.normal(jax.random.key(0), (4, 7))
    head = Projection(dim=3, hidden=11)
    params = head.init(jax.random.key(1), x)["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "norm": {"scale": (7,), "bias": (7,)},
        "hidden": {"kernel": (7, 11), "bias": (11,)},
        "output": {"kernel": (11, 3)},
    }
    normed = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
    hidden = jax.nn.gelu(normed @ params["hidden"]["kernel"])
    np.testing.assert_allclose(
        head.apply({"params": params}, x), hidden @ params["output"]["kernel"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_two_processes_on_kept_features_are_bit_identical_to_two_that_keep_none(tmp_path):
    (tmp_path / "config.py").write_text(
        textwrap.dedent(
            f"""
            from tests.support.tiny import tiny_config

            def get_config():
                return tiny_config(
                    data__cache_dir={str(tmp_path / "cache")!r}, fne__start_epoch=1.0,
                    **{THREE | LOWER | PLAIN_IMAGES}
                )
            """
        )
    )
    states = []
    for name, flags in (("plain", []), ("kept", ["--config.data.keep_frozen=True"])):
        command = [
            *(sys.executable, "-m", "fne_jax.train", f"--config={tmp_path / 'config.py'}"),
            *(f"--workdir={tmp_path / name}", f"--coordinator=localhost:{free_port()}"),
            *("--processes=2", *flags),
        ]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(2)}
        begun = [
            subprocess.Popen([*command, f"--process-index={index}"], cwd=TOP, env=environment)
            for index in range(2)
        ]
        assert [process.wait(300) for process in begun] == [0, 0]
        states.append(stored_state(tmp_path / name))
    assert bits(states[0]) == bits(states[1])
    folders = {path.name.partition("-")[0] for path in (tmp_path / "cache" / "frozen").iterdir()}
    assert folders == {"image", "text"}

"""Reading and writing Hugging Face's layout: what is accepted, refused, and left behind."""

import json
import logging
import math
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from fne_jax import load_pretrained, save_pretrained
from fne_jax.encoders import pretrained_weights
from fne_jax.encoders.bert import Bert
from fne_jax.encoders.dual_encoder import DualEncoder
from fne_jax.encoders.vision_transformer import VisionTransformer
from fne_jax.errors import UserError

MODELS = ("encoders/vit", "encoders/bert", "clip", "siglip")


def write_model(folder, golden_model, tensors=None, **fields):
    """Writes a golden model with other tensors or fields of its config."""
    folder.mkdir(parents=True)
    config = json.loads((golden_model / "config.json").read_text())
    for name, value in fields.items():
        *parts, last = name.split("__")
        inner = config
        for part in parts:
            inner = inner[part]
        inner[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is None:
        tensors = load_file(golden_model / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def made_up(module, *inputs):
    """Returns parameters of the right shapes, without the wait for a random initialisation."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), jnp.float32), shapes)


def assert_same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_saved_tensors_are_the_bytes_that_were_read(golden, tmp_path, model, scan_layers):
    module, params = load_pretrained(golden / model, scan_layers=scan_layers)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    folder = tmp_path / "new" / "model"
    save_pretrained(folder, module, params)
    before = load_file(golden / model / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() - after.keys() <= {"pooler.dense.weight", "pooler.dense.bias"}
    for name, value in after.items():
        assert value.shape == before[name].shape and value.tobytes() == before[name].tobytes(), name

    theirs = transformers.AutoConfig.from_pretrained(folder)
    original = transformers.AutoConfig.from_pretrained(golden / model)
    assert type(theirs) is type(original) and theirs.architectures == original.architectures
    again, params_again = load_pretrained(folder, scan_layers=scan_layers)
    assert again == module
    assert_same(params_again, params)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "config.json", "model", "model.safetensors", "new",
    ]  # fmt: skip


def test_shards_prefixes_old_names_and_other_tasks_entries(golden, tmp_path):
    tensors = {}
    for name, value in load_file(golden / "encoders/bert/model.safetensors").items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        tensors["bert." + old.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    tensors["bert.embeddings.position_ids"] = np.arange(40)[None]
    tensors["cls.predictions.bias"] = np.zeros(120, np.float32)
    tensors["cls.seq_relationship.weight"] = np.zeros((2, 48), np.float32)
    tensors["classifier.weight"] = np.zeros((2, 48), np.float32)
    folder = write_model(tmp_path / "bert", golden / "encoders/bert", tensors)
    _, params = load_pretrained(golden / "encoders/bert")
    assert_same(load_pretrained(folder)[1], params)

    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::3]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(load_pretrained(folder)[1], params)

    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"not beside it: model-00002-of-00003.safetensors"):
        load_pretrained(folder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halved_files_become_float32(golden, tmp_path, dtype):
    tensors = load_file(golden / "encoders/vit/model.safetensors")
    halved = {f"vit.{name}": value.astype(dtype) for name, value in tensors.items()}
    # Entries that other tasks' models have.
    halved["vit.embeddings.mask_token"] = np.zeros((1, 1, 48), dtype)
    folder = write_model(tmp_path / "vit", golden / "encoders/vit", halved, dtype="float16")
    params = load_pretrained(folder)[1]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    np.testing.assert_array_equal(
        params["encoder"]["layer_1"]["mlp_in"]["kernel"],
        halved["vit.encoder.layer.1.intermediate.dense.weight"].T.astype(np.float32),
    )


def test_fields_left_out_have_the_values_of_transformers(golden, tmp_path):
    folder = write_model(tmp_path / "siglip", golden / "siglip")
    config = json.loads((folder / "config.json").read_text())
    for name in ("hidden_act", "layer_norm_eps", "projection_size"):
        del config["text_config"][name]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_pretrained(folder)[0] == load_pretrained(golden / "siglip")[0]


def test_one_message_names_all_that_is_wrong(golden, tmp_path):
    tensors = load_file(golden / "clip/model.safetensors")
    del tensors["text_projection.weight"], tensors["vision_model.pre_layrnorm.bias"]
    tensors["text_model.extra.weight"] = np.zeros(3, np.float32)
    tensors["visual_projection.weight"] = np.zeros((31, 48), np.float32)
    tensors["text_model.encoder.layers.1.mlp.fc1.bias"] = np.zeros(80, np.int8)
    folder = write_model(tmp_path / "clip", golden / "clip", tensors)
    with pytest.raises(UserError) as raised:
        load_pretrained(folder)
    assert str(raised.value) == (
        f"{folder}: the weights are not those of the clip that config.json describes: "
        "text_model.encoder.layers.1.mlp.fc1.bias is of type I8, no float; "
        "missing vision_model.pre_layrnorm.bias, text_projection.weight; "
        "unexpected text_model.extra.weight; "
        "visual_projection.weight is (31, 48), expected (32, 48). "
        "Take both files from the same model."
    )


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("encoders/vit", {"model_type": "deit"}, r"'deit'; expected one of vit, [^.]*$"),
        ("encoders/vit", {"qkv_bias": False}, "qkv_bias is False; only True"),
        ("encoders/vit", {"image_size": [32, 40]}, r"image_size is \[32, 40\]"),
        ("encoders/vit", {"hidden_size": "wide"}, "is no config of a vit.*hidden_size"),
        ("encoders/bert", {"hidden_act": "relu"}, "hidden_act is 'relu'; expected one of gelu"),
        ("encoders/bert", {"num_attention_heads": 5}, "hidden_size is 48, which 5 heads"),
        ("encoders/bert", {"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ("siglip", {"vision_config__vision_use_head": False}, "vision_config.vision_use_head"),
    ],
)
def test_configs_that_are_not_supported(golden, tmp_path, model, fields, message):
    folder = write_model(tmp_path / "model", golden / model, {}, **fields)
    with pytest.raises(UserError, match=message) as raised:
        load_pretrained(folder)
    assert str(folder / "config.json") in str(raised.value)


def test_square_sizes_may_be_stated_twice(golden, tmp_path):
    folder = write_model(tmp_path / "vit", golden / "encoders/vit", image_size=[32, 32])
    assert load_pretrained(folder)[0] == load_pretrained(golden / "encoders/vit")[0]


def test_files_that_are_absent_pickled_or_damaged(golden, tmp_path):
    folder = tmp_path / "vit"
    folder.mkdir()
    with pytest.raises(UserError, match=r"vit holds no config.json"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        load_pretrained(folder)
    shutil.copy(golden / "encoders/vit/config.json", folder)
    with pytest.raises(UserError, match=r"holds no model.safetensors\. Convert"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a pickle.*Convert"):
        load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["attention", "remat"])
def test_ways_to_compute_are_checked(golden, name):
    with pytest.raises(UserError, match=f"^{name} is 'some'; expected one of (auto, xla|none, pr)"):
        load_pretrained(golden / "encoders/vit", **{name: "some"})


def test_names_go_to_the_hub(golden, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"'nobody/nothing' is neither a local folder.*Give a fold"):
        load_pretrained("nobody/nothing")
    with pytest.raises(UserError, match="is neither a local folder"):
        load_pretrained(tmp_path / "absent")

    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(golden / "encoders/vit")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_pretrained("some/vit", revision="v2")
    assert asked == [
        (
            "some/vit",
            {
                "revision": "v2",
                "allow_patterns": [
                    "config.json",
                    "model*.safetensors",
                    "model.safetensors.index.json",
                    "modules.json",
                    "config_sentence_transformers.json",
                    "sentence_*_config.json",
                    "*/config.json",
                    "*_Dense/model.safetensors",
                ],
            },
        )
    ]


def interpolated(grid, new):
    """Bicubic interpolation of an [old, old, width] grid, a point at a time."""
    old = len(grid)

    def weight(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return ((a + 2) * x - (a + 3)) * x * x + 1
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0

    out = np.zeros((new, new, grid.shape[-1]))
    for row in range(new):
        for column in range(new):
            y, x = ((i + 0.5) * old / new - 0.5 for i in (row, column))
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    source = grid[min(max(i, 0), old - 1), min(max(j, 0), old - 1)]
                    out[row, column] += weight(y - i) * weight(x - j) * source
    return out


@pytest.mark.parametrize(
    ("model", "image_size", "class_tokens"),
    [("encoders/vit", 56, 1), ("clip", 48, 1), ("siglip", 24, 0)],
)
def test_positions_are_interpolated(golden, caplog, model, image_size, class_tokens):
    plain_module, plain = load_pretrained(golden / model)
    assert_same(load_pretrained(golden / model, image_size=32)[1], plain)
    with caplog.at_level(logging.INFO, "fne_jax"):
        module, params = load_pretrained(golden / model, image_size=image_size)
    assert f"images of {image_size} pixels, from 4 x 4 of 32" in caplog.text

    tower, params_of = module, lambda tree: tree
    if isinstance(module, DualEncoder):
        tower, params_of = module.image, lambda tree: tree["image"]
        assert module.text == plain_module.text
    before = np.asarray(params_of(plain)["position_embedding"])
    after = np.asarray(params_of(params)["position_embedding"])
    np.testing.assert_array_equal(after[:, :class_tokens], before[:, :class_tokens])
    new = image_size // 8
    expected = interpolated(before[0, class_tokens:].reshape(4, 4, -1), new)
    np.testing.assert_allclose(
        after[0, class_tokens:], expected.reshape(new * new, -1), rtol=1e-6, atol=1e-6
    )
    pixels = jnp.ones((1, image_size, image_size, 3))
    out = jax.eval_shape(lambda p: tower.apply({"params": params_of(p)}, pixels), params)
    assert out.last_hidden_state.shape == (1, new * new + class_tokens, 48)


@pytest.mark.parametrize(
    ("model", "image_size", "message"),
    [
        ("encoders/vit", 36, "36; expected a multiple of the checkpoint's patch size, 8"),
        ("encoders/vit", 0, "0; expected a multiple"),
        ("encoders/bert", 32, "reads no images; leave it out"),
    ],
)
def test_image_sizes_that_do_not_fit(golden, model, image_size, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(golden / model, image_size=image_size)


def test_a_trained_model_of_random_weights_is_saved_with_first_values(tmp_path, golden):
    module, loaded = load_pretrained(golden / "siglip", scan_layers=True)
    # A text tower whose embedding is not as wide as its tokens.
    module = module.clone(text=module.text.clone(projection_dim=20))
    tokens = jnp.ones((1, 5), jnp.int32)
    params = made_up(module, jnp.zeros((1, 32, 32, 3)), tokens, tokens)
    assert params.keys() == loaded.keys() - {"logit_scale", "logit_bias"}
    save_pretrained(tmp_path / "siglip", module, params)
    again, params_again = load_pretrained(tmp_path / "siglip")
    assert again.text.projection_dim == 20
    np.testing.assert_allclose(params_again.pop("logit_scale"), [np.log(10)], rtol=1e-6)
    np.testing.assert_array_equal(params_again.pop("logit_bias"), [-10])
    np.testing.assert_array_equal(
        params_again["text"]["encoder"]["layer_1"]["mlp_in"]["kernel"],
        params["text"]["encoder"]["layers"]["mlp_in"]["kernel"][1],
    )


def test_only_whole_models_of_these_types_are_saved(golden, tmp_path):
    module, params = load_pretrained(golden / "clip")
    wrong = {**params, "more": jnp.zeros(2), "logit_scale": jnp.zeros(2)}
    del wrong["text"]
    with pytest.raises(UserError, match=r"clip: missing text/.*unexpected more; logit_scale is"):
        save_pretrained(tmp_path / "out", module, wrong)
    bert, bert_params = load_pretrained(golden / "encoders/bert")
    for other in (
        DualEncoder(image=module.image, text=bert),
        module.clone(projection_dim=3),
    ):
        with pytest.raises(UserError, match=r"save_pretrained writes.*one by one"):
            save_pretrained(tmp_path / "out", other, params)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        save_pretrained(tmp_path / "file", bert, bert_params)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nothing_half_written_stays_behind(golden, tmp_path, monkeypatch):
    module, params = load_pretrained(golden / "encoders/vit")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pretrained_weights, "config_json", fail)
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(tmp_path / "vit", module, params)
    assert not list(tmp_path.iterdir())

    # Over an older model, beside files of others.
    save_pretrained(tmp_path / "vit", module, jax.tree.map(jnp.zeros_like, params))
    (tmp_path / "vit" / "notes.txt").write_text("mine")
    save_pretrained(tmp_path / "vit", module, params)
    assert_same(load_pretrained(tmp_path / "vit")[1], params)
    assert (tmp_path / "vit" / "notes.txt").read_text() == "mine"


def test_towers_of_the_project_are_saved_too(tmp_path):
    shape = {"width": 12, "layers": 2, "heads": 3, "mlp_width": 20}
    for module, inputs in (
        (VisionTransformer(12, 4, **shape), (jnp.zeros((1, 12, 12, 3)),)),
        (Bert(30, 9, **shape), (jnp.ones((1, 4), jnp.int32),) * 2),
    ):
        params = made_up(module, *inputs)
        save_pretrained(tmp_path / "model", module, params)
        again, params_again = load_pretrained(tmp_path / "model")
        assert again == module
        assert_same(params_again, params)

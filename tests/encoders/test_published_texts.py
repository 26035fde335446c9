"""Published text encoders against PyTorch's transformers, for small random models."""

import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from fne_jax import load_pretrained, save_pretrained
from fne_jax.encoders import freezing
from fne_jax.encoders.dual_encoder import DualEncoder
from fne_jax.encoders.pretrained_weights import params_from_tensors
from fne_jax.errors import UserError

PAD = 1
SIZES = {
    "vocab_size": 37,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 23,
    "pad_token_id": PAD,
}
MODELS = {
    "distilbert": {
        "vocab_size": 37,
        "dim": 12,
        "n_layers": 3,
        "n_heads": 3,
        "hidden_dim": 20,
        "max_position_embeddings": 23,
    },
    "mpnet": {**SIZES, "layer_norm_eps": 1e-5},
    "roberta": {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "xlm-roberta": {**SIZES, "type_vocab_size": 1, "pad_token_id": 2},
}
# Longer than the distances that have a bucket of their own; padding at the end.
IDS = np.random.default_rng(0).integers(5, 37, (3, 17))
MASK = (np.arange(17) < np.array([[17], [9], [2]])).astype(int)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns a function from a model type to PyTorch's model and the folder that holds it."""
    known = {}

    def model(model_type):
        if model_type not in known:
            torch.manual_seed(0)
            config = transformers.CONFIG_MAPPING[model_type](**MODELS[model_type])
            theirs = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():  # biases begin at 0, and norms at 1
                for weight in theirs.parameters():
                    weight.add_(torch.randn(weight.shape) / 4)
            folder = tmp_path_factory.mktemp(model_type)
            theirs.save_pretrained(folder)
            known[model_type] = theirs, folder
        return known[model_type]

    return model


def tokens_of(folder):
    pad = json.loads((folder / "config.json").read_text())["pad_token_id"]
    return np.where(MASK, IDS, pad), MASK


def hidden_of(module, params, ids, mask):
    return jax.jit(module.apply)({"params": params}, ids, mask).last_hidden_state


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": "full"}], ids=str)
@pytest.mark.parametrize("model_type", MODELS)
def test_hidden_states_and_gradients_agree(models, model_type, options):
    theirs, folder = models(model_type)
    ids, mask = tokens_of(folder)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, 12)) * mask[..., None]
    hidden = theirs(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    theirs.zero_grad()
    (hidden * torch.tensor(weights, dtype=torch.float32)).sum().backward()
    expected = hidden.detach().numpy()

    module, params = load_pretrained(folder, **options)

    def loss(params):
        hidden = module.apply({"params": params}, ids, mask).last_hidden_state
        return (hidden * weights).sum(), hidden

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    real = mask.astype(bool)
    np.testing.assert_allclose(ours[real], expected[real], rtol=1e-5, atol=1e-5)
    tensors = {
        name: weight.grad.numpy()
        for name, weight in theirs.named_parameters()
        if weight.grad is not None
    }
    expected = flax.traverse_util.flatten_dict(params_from_tensors(module, tensors, "gradients"))
    for path, gradient in flax.traverse_util.flatten_dict(gradients).items():
        scale = max(np.abs(expected[path]).max(), 1.0)  # it is 0 for biases of keys
        np.testing.assert_allclose(
            gradient, expected[path], rtol=1e-5, atol=1e-5 * scale, err_msg="/".join(path)
        )


@pytest.mark.parametrize("model_type", ["mpnet", "xlm-roberta"])
def test_positions_count_what_is_no_padding(models, model_type):
    theirs, folder = models(model_type)
    ids, mask = tokens_of(folder)
    pad = ids[-1, -1]
    ids[0, [0, 3, 4]] = pad  # looked at all the same
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    ours = hidden_of(*load_pretrained(folder), ids, mask)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    longest = 23 - pad - 1
    module, params = load_pretrained(folder)
    assert module.max_tokens == longest
    with pytest.raises(ValueError, match=f"at most {longest} tokens, got {longest + 1}"):
        jax.eval_shape(module.apply, {"params": params}, jnp.ones((1, longest + 1), int))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_saved_models_are_those_that_were_read(models, tmp_path, model_type, scan_layers):
    theirs, folder = models(model_type)
    save_pretrained(tmp_path, *load_pretrained(folder, scan_layers=scan_layers))
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() - after.keys() <= {"pooler.dense.weight", "pooler.dense.bias"}
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(theirs)
    assert load_pretrained(tmp_path)[0] == load_pretrained(folder)[0]


@pytest.mark.parametrize(
    ("model_type", "prefix", "others"),
    [
        ("distilbert", "distilbert", ["vocab_transform.weight", "pre_classifier.bias"]),
        ("mpnet", "mpnet", ["lm_head.dense.weight", "mpnet.embeddings.position_ids"]),
        ("roberta", "roberta", ["lm_head.layer_norm.bias", "classifier.dense.weight"]),
        ("xlm-roberta", "roberta", ["lm_head.bias", "roberta.embeddings.position_ids"]),
    ],
)
def test_models_for_tasks_hold_the_encoder(models, tmp_path, model_type, prefix, others):
    _, folder = models(model_type)
    tensors = load_file(folder / "model.safetensors")
    named = {f"{prefix}.{name}": value for name, value in tensors.items()}
    save_file(named | dict.fromkeys(others, np.zeros(3)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    jax.tree.map(
        np.testing.assert_array_equal, load_pretrained(tmp_path)[1], load_pretrained(folder)[1]
    )


def test_a_bias_needs_attention_that_adds_it(models):
    _, folder = models("mpnet")
    ids, mask = tokens_of(folder)
    for attention in ("splash", "cudnn", "head_loop"):
        module, params = load_pretrained(folder, attention=attention)
        with pytest.raises(UserError, match=f"^attention is '{attention}', .* auto or xla"):
            jax.eval_shape(module.apply, {"params": params}, ids, mask)
    module, params = load_pretrained(folder)
    np.testing.assert_array_equal(
        hidden_of(module, params, ids, mask),
        hidden_of(module.clone(attention="xla"), params, ids, mask),
    )
    # Layers above frozen ones add the bias that those have.
    frozen = module.clone(frozen_layers=1)
    lower = frozen.apply({"params": params}, ids, mask, lower=True)
    np.testing.assert_allclose(
        frozen.apply({"params": params}, None, mask, hidden=lower).last_hidden_state,
        hidden_of(module, params, ids, mask),
        rtol=1e-5,
        atol=1e-6,
    )
    pair = DualEncoder(image=None, text=frozen)
    parts = freezing.split(pair, {"text": params})
    assert list(parts[freezing.Part.BASE]["text"]) == ["relative_attention_bias"]


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("t5", {}, r"model_type is 't5'; expected one of .*\bbert, distilbert, mpnet, roberta"),
        ("gpt2", {}, r"model_type is 'gpt2'; expected one of vit"),
        ("distilbert", {"activation": "relu"}, "activation is 'relu'; expected one of gelu"),
        ("distilbert", {"n_heads": 5}, "dim is 12, which 5 heads do not divide"),
        ("roberta", {"is_decoder": True}, "is_decoder is True; only False is supported"),
        ("roberta", {"pad_token_id": None}, "pad_token_id is None; only a number is supported"),
        (
            "mpnet",
            {"relative_attention_num_buckets": 16},
            "relative_attention_num_buckets is 16; only 32 is supported",
        ),
    ],
)
def test_what_cannot_be_taken_is_refused_in_one_line(tmp_path, model_type, fields, message):
    config = {"model_type": model_type, **MODELS.get(model_type, {}), **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as raised:
        load_pretrained(tmp_path)
    assert "\n" not in str(raised.value)

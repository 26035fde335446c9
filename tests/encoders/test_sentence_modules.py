"""Folders of sentence-transformers as text towers, against what they define, by hand in PyTorch."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from fne_jax import configuration, load_pretrained, save_pretrained
from fne_jax.data import captions as caption_lib
from fne_jax.data.sources.registry import load_split
from fne_jax.encoders import sentence_modules, towers
from fne_jax.errors import UserError
from fne_jax.model import tokenizers
from fne_jax.model.model import build_model, initial_params
from fne_jax.parallel import sharding
from tests.support.tiny import tiny_config

CAPTIONS = ["A small, red circle!", "Two dogs", "image 3 and image 5 of a blue-green square"]
CONFIGS = {
    "distilbert": {"dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 20},
    "xlm-roberta": {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "pad_token_id": 0,
    },
}
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
CLS = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True, "include_prompt": False}
TANH = {"out_features": 14, "activation_function": "torch.nn.modules.activation.Tanh"}
LINEAR = {
    "out_features": 10,
    "bias": False,
    "activation_function": "torch.nn.modules.linear.Identity",
}


@pytest.fixture(scope="module")
def tokenizer():
    train = load_split(tiny_config().data, 8, "train")
    return caption_lib.fit_tokenizer([*train.captions, *CAPTIONS, "query:"], 120)


def write_folder(folder, tokenizer, model_type, pooling, dense=(), prompts=None, **settings):
    """Writes a folder of sentence-transformers; returns PyTorch's transformer and dense layers."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](
        vocab_size=len(tokenizer), max_position_embeddings=41, **CONFIGS[model_type]
    )
    transformer = transformers.AutoModel.from_config(config).eval()
    transformer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kinds = ["Transformer", "Pooling", *("Dense" for _ in dense), "Normalize"]
    modules = [
        {
            "idx": index,
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    contents = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": False} | settings,
        "config_sentence_transformers.json": prompts or {"__version__": {}},
        "1_Pooling/config.json": {"word_embedding_dimension": 12} | pooling,
    }
    layers, width = [], 12
    for index, fields in enumerate(dense, 2):
        path = f"{index}_Dense"
        contents[f"{path}/config.json"] = {"in_features": width, "bias": True} | fields
        layer = torch.nn.Linear(width, fields["out_features"], fields.get("bias", True))
        width = fields["out_features"]
        layers.append((layer, torch.tanh if fields is TANH else torch.nn.Identity()))
        (folder / path).mkdir()
        weights = {f"linear.{k}": v.detach().numpy() for k, v in layer.named_parameters()}
        save_file(weights, folder / path / "model.safetensors")
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return transformer, layers


def sentence_embeddings(transformer, layers, pooling, tokenizer, texts):
    """Returns what SentenceTransformer.encode would with normalisation, computed by hand."""
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    mask = encoded["attention_mask"]
    with torch.no_grad():
        hidden = transformer(encoded["input_ids"], mask).last_hidden_state
        if pooling == "cls":
            pooled = hidden[:, 0]
        elif pooling == "max":
            pooled = hidden.masked_fill(mask[..., None] == 0, -1e9).max(dim=1).values
        else:
            pooled = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        for layer, activation in layers:
            pooled = activation(layer(pooled))
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()


def config_of(folder, width, **fields):
    open_fields = {"data__tokenizer": "auto", "data__text_length": 0, "data__prompt": "auto"}
    return tiny_config(
        encoder__image__width=width,
        encoder__text__pretrained=str(folder),
        **{**open_fields, **fields},
    )


@pytest.mark.parametrize(
    ("model_type", "pooling", "dense", "prompts", "ours"),
    [
        ("distilbert", MEAN, (), None, ("mean", "")),
        ("xlm-roberta", CLS, (TANH,), None, ("checkpoint", "")),
        ("distilbert", MEAN, (TANH, LINEAR), None, ("checkpoint", "")),
        (
            "xlm-roberta",
            {"pooling_mode": "max"},
            (),
            {"prompts": {"search": "query: "}, "default_prompt_name": "search"},
            ("max", "query: "),
        ),
    ],
)
def test_embeddings_are_those_that_the_folder_defines(
    tokenizer, tmp_path, model_type, pooling, dense, prompts, ours
):
    transformer, layers = write_folder(tmp_path, tokenizer, model_type, pooling, dense, prompts)
    config = config_of(tmp_path, dense[-1]["out_features"] if dense else 12)
    assert (config.encoder.text.pooling, config.data.prompt) == ours
    assert config.encoder.text.training_pooling == ours[0] and config.data.text_length == 24
    architectures = towers.read_architectures(config.encoder)
    model = build_model(
        config,
        architectures,
        caption_lib.load_tokenizer(config.data.tokenizer),
        sharding.create_mesh(),
    )
    random, _ = initial_params(model.module, config, jax.random.key(0))
    model = model.with_params(towers.pretrained_params(config.encoder, random))

    # As they are: with case and punctuation.
    texts = [ours[1] + text for text in CAPTIONS]
    kind = "cls" if pooling is CLS else pooling.get("pooling_mode", "mean")
    expected = sentence_embeddings(transformer, layers, kind, tokenizer, texts)
    np.testing.assert_allclose(model.embed_texts(CAPTIONS), expected, rtol=1e-5, atol=1e-6)


def test_an_encoder_alone_gives_the_embedding(tokenizer, tmp_path):
    transformer, layers = write_folder(tmp_path, tokenizer, "distilbert", MEAN, (TANH,))
    module, params = load_pretrained(tmp_path, scan_layers=True)
    ids, mask = caption_lib.tokenize(tokenizer, CAPTIONS, 24)
    pooled = module.apply({"params": params}, ids, mask).pooled
    assert pooled.shape == (3, module.pooled_dim) == (3, 14)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    expected = sentence_embeddings(transformer, layers, "mean", tokenizer, CAPTIONS)
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="ends in dense layers of sentence-transformers"):
        save_pretrained(tmp_path / "out", module, params)
    assert not (tmp_path / "out").exists()


def test_a_run_keeps_what_the_folder_says(tokenizer, tmp_path):
    folder, workdir = tmp_path / "folder", tmp_path / "run"
    write_folder(folder, tokenizer, "distilbert", MEAN, (TANH,))
    config = config_of(folder, 14)
    workdir.mkdir()
    towers.store_architectures(towers.read_architectures(config.encoder), workdir)
    (folder / "modules.json").unlink()
    assert "sentence_transformers" not in towers.read_architectures(config.encoder)["text"]
    kept = towers.read_architectures(config.encoder, workdir)["text"]
    tower = towers.build_dual_encoder(config.encoder, len(tokenizer), {"text": kept}).text
    assert tower.sentence_head.layers[0].features == 14


def test_lengths_and_prompts_that_a_config_sets(tokenizer, tmp_path):
    write_folder(tmp_path, tokenizer, "distilbert", MEAN, max_seq_length=None, do_lower_case=True)
    assert config_of(tmp_path, 12).data.text_length == 30
    write_folder(tmp_path / "2", tokenizer, "distilbert", MEAN)
    with pytest.raises(UserError, match=r"config.data.text_length is 25, more than the 24 tokens"):
        config_of(tmp_path / "2", 12, data__text_length=25)
    with pytest.raises(UserError, match=r"config.evaluation.text_length is 30, more than the 24"):
        config_of(tmp_path / "2", 12, evaluation__text_length=30)
    config = config_of(tmp_path, 12, data__prompt="query: ", data__text_length=12)
    assert tokenizers.clean_captions(config, ["Two dogs!", ""]) == ["query: two dogs!", "query:"]
    for texts, said in ((["Two dogs"], ""), (["dogs " * 20], "it is cut to 12 tokens")):
        tokens = caption_lib.tokenize(tokenizer, tokenizers.clean_captions(config, texts), 12)
        assert tokenizers.unread(config, texts, tokenizer, tokens).startswith(said)


def change(folder, name, new):
    path = folder / name
    content = json.loads(path.read_text())
    content = new(content) if callable(new) else content | new
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "new", "message"),
    [
        ("modules.json", lambda x: x[::-1], "its modules are Normalize, Dense, Pooling, Transf"),
        (
            "modules.json",
            lambda x: [x[0] | {"type": "models.CLIPModel"}],
            r"are CLIPModel; expected Transformer, Pooling, maybe Dense, and maybe Normalize",
        ),
        ("modules.json", lambda x: [x[0] | {"path": "0_T"}, *x[1:]], "its transformer is in 0_T"),
        ("modules.json", lambda x: [{"idx": 0}], "modules.json is damaged: 'type'"),
        ("modules.json", lambda x: {}, r"modules.json is damaged \(no JSON array"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "is mean and max; expected"),
        (
            "1_Pooling/config.json",
            lambda x: {"pooling_mode_lasttoken": True},
            "its pooling is lasttoken; expected one of cls, mean, max",
        ),
        ("1_Pooling/config.json", lambda x: {}, "its pooling is none"),
        (
            "2_Dense/config.json",
            {"activation_function": "torch.nn.modules.activation.ReLU"},
            "ReLU",
        ),
        ("2_Dense/config.json", {"out_features": None}, "out_features is None; expected a number"),
        ("2_Dense/config.json", {"out_features": 9}, "2_Dense.linear.weight is .14, 12., expected"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_one_line(tokenizer, tmp_path, name, new, message):
    write_folder(tmp_path, tokenizer, "distilbert", MEAN, (TANH,))
    change(tmp_path, name, new)
    with pytest.raises(UserError, match=message) as raised:
        load_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_prompts_whose_tokens_are_not_pooled_are_refused(tokenizer, tmp_path):
    prompts = {"prompts": {"a": "To find: "}, "default_prompt_name": "a"}
    write_folder(tmp_path, tokenizer, "distilbert", CLS, (), prompts)
    with pytest.raises(UserError, match=r"the prompt 'To find: ' are left out of the pooling"):
        load_pretrained(tmp_path)
    change(tmp_path, "1_Pooling/config.json", {"include_prompt": True})
    change(tmp_path, "sentence_bert_config.json", {"do_lower_case": True})
    assert sentence_modules.read_modules(tmp_path)["prompt"] == "to find: "


def test_modules_beside_an_encoder_of_images_are_refused(golden, tokenizer, tmp_path):
    write_folder(tmp_path, tokenizer, "distilbert", MEAN)
    vit = golden / "encoders" / "vit" / "config.json"
    (tmp_path / "config.json").write_text(vit.read_text())
    with pytest.raises(UserError, match="is of type vit, which is no encoder of texts"):
        load_pretrained(tmp_path)


@pytest.mark.slow
def test_a_published_folder_agrees(weights):
    folder = weights / "minilm_l6"
    transformer = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = caption_lib.load_tokenizer(str(folder))
    ids, mask = caption_lib.tokenize(tokenizer, CAPTIONS, 30)
    with torch.no_grad():
        hidden = transformer(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    module, params = load_pretrained(folder)
    ours = np.asarray(jax.jit(module.apply)({"params": params}, ids, mask).last_hidden_state)
    deviation = np.abs(ours - hidden)[mask.astype(bool)].max()
    print(f"hidden states of {folder.name}: {deviation:.1e}")
    assert deviation < 1e-3

    config = configuration.resolve(
        config_of(folder, 384, encoder__image__heads=2, encoder__image__layers=1)
    )[0]
    assert config.encoder.text.pooling == "mean" and config.data.text_length == 30
    architectures = towers.read_architectures(config.encoder)
    model = build_model(config, architectures, tokenizer, sharding.create_mesh())
    random, _ = initial_params(model.module, config, jax.random.key(0))
    model = model.with_params(towers.pretrained_params(config.encoder, random))
    expected = sentence_embeddings(transformer, [], "mean", tokenizer, CAPTIONS)
    np.testing.assert_allclose(model.embed_texts(CAPTIONS), expected, atol=1e-5)

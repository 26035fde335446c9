"""Image encoders against PyTorch's transformers, on random weights of the published layouts."""

import json
import string

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from fne_jax import load_pretrained, save_pretrained
from fne_jax.data.captions import clean_caption, load_tokenizer, tokenize
from fne_jax.encoders.dinov2 import Dinov2
from fne_jax.encoders.dinov3 import Dinov3
from fne_jax.errors import UserError
from tests.support.parameters import drawn_parameters
from tests.support.tiny import tiny_config

TOLERANCE = 1e-5
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
}
CONFIGS = {
    "dinov2": transformers.Dinov2Config(**SIZES, mlp_ratio=3),
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig(
        **SIZES, mlp_ratio=3, num_register_tokens=2
    ),
    "dinov3_vit": transformers.DINOv3ViTConfig(
        **SIZES, intermediate_size=40, num_register_tokens=2
    ),
}
# Of PyTorch's embeddings that nothing here reads: it stands for patches hidden in pretraining.
MASK_TOKEN = "embeddings.mask_token"


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module", params=CONFIGS)
def published(request, tmp_path_factory):
    """The folder of a model of random weights, and the model."""
    model = random_model(CONFIGS[request.param])
    folder = tmp_path_factory.mktemp("published") / request.param
    model.save_pretrained(folder)
    return folder, model


def random_model(config):
    """Returns a transformers model of that config, all of whose weights are drawn at random."""
    model = transformers.AutoModel.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = "norm" in name and name.endswith("weight")
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + scale)
    return model


def pixels_of(size, images=2):
    return np.random.default_rng(size).normal(size=(images, size, size, 3)).astype(np.float32)


def hidden_states(model, pixels):
    """Returns PyTorch's last hidden states."""
    return model(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state


def saved_tensors(folder):
    return load_file(folder / "model.safetensors")


def gradients_of(model, pixels, weights, folder):
    """Returns PyTorch's gradients of weighted hidden states, under the names of its files."""
    model.zero_grad()
    (hidden_states(model, pixels) * torch.tensor(weights)).sum().backward()
    gradients = transformers.AutoModel.from_config(model.config)
    with torch.no_grad():
        for to, weight in zip(gradients.parameters(), model.parameters(), strict=True):
            to.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    gradients.save_pretrained(folder)
    return saved_tensors(folder)


@pytest.mark.parametrize(
    ("image_size", "scan_layers"), [(28, False), (28, True), (42, True), (14, False)]
)
def test_hidden_states_and_gradients_are_those_of_pytorch(
    published, tmp_path, image_size, scan_layers
):
    folder, model = published
    module, params = load_pretrained(folder, image_size=image_size, scan_layers=scan_layers)
    pixels = pixels_of(image_size)
    expected = hidden_states(model, pixels).detach().numpy()
    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)

    def weighted(params):
        hidden = module.apply({"params": params}, pixels).last_hidden_state
        return (hidden * weights).sum(), hidden

    gradients, hidden = jax.jit(jax.grad(weighted, has_aux=True))(params)
    np.testing.assert_allclose(hidden, expected, rtol=TOLERANCE, atol=TOLERANCE)
    save_pretrained(tmp_path / "ours", module, gradients)
    ours = saved_tensors(tmp_path / "ours")
    if image_size != 28:
        # PyTorch's is of what was interpolated, and ours of the result.
        ours.pop("embeddings.position_embeddings", None)
    theirs = gradients_of(model, pixels, weights, tmp_path / "theirs")
    for name, gradient in ours.items():
        # Gradients go into the hundreds, but those of the keys' biases, which are 0 but for
        # rounding.
        atol = TOLERANCE * max(1.0, np.abs(theirs[name]).max())
        np.testing.assert_allclose(gradient, theirs[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_is_saved_is_what_was_read(published, tmp_path, scan_layers):
    folder, model = published
    module, params = load_pretrained(folder, scan_layers=scan_layers)
    save_pretrained(tmp_path, module, params)
    before, after = saved_tensors(folder), saved_tensors(tmp_path)
    assert before.keys() - after.keys() == {MASK_TOKEN}
    for name, value in after.items():
        assert value.shape == before[name].shape and value.tobytes() == before[name].tobytes(), name
    assert load_pretrained(tmp_path, scan_layers=scan_layers)[0] == module

    again, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model)
    assert report["missing_keys"] == {MASK_TOKEN} and not report["unexpected_keys"]
    assert torch.equal(hidden_states(again, pixels_of(28)), hidden_states(model, pixels_of(28)))


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn is True; only False is supported"),
        ("dinov2", {"mlp_ratio": 2.5}, "is no config of a dinov2.*mlp_ratio"),
        ("dinov3_vit", {"use_gated_mlp": True}, "use_gated_mlp is True; only False is supported"),
        ("dinov3_vit", {"key_bias": True}, "key_bias is True; only False is supported"),
        ("dinov3_vit", {"rope_theta": 10.0}, "rope_theta is 10.0; only 100.0 is supported"),
        ("siglip2", {}, "model_type is 'siglip2'; expected one of vit,.*NaFlex.*type siglip$"),
        ("swin", {}, "model_type is 'swin'; expected one of vit,"),
        ("llama", {}, "model_type is 'llama'; expected one of vit,"),
    ],
)
def test_what_cannot_be_taken(tmp_path, model_type, fields, message):
    known = CONFIGS[model_type].to_dict() if model_type in CONFIGS else {}
    config = {**known, "model_type": model_type, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as raised:
        load_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_heads_too_narrow_to_rotate():
    tower = Dinov3(28, 7, width=24, layers=1, heads=4, mlp_width=40, registers=2)
    with pytest.raises(UserError, match=r"heads are 6 wide; .* a multiple of 4"):
        tower.attend()


def test_a_width_that_no_config_states_is_not_saved(tmp_path):
    module = Dinov2(28, 7, width=24, layers=1, heads=3, mlp_width=50)
    params = drawn_parameters(module, np.zeros((1, 28, 28, 3), np.float32))
    with pytest.raises(UserError, match=r"mlp_width is 50; .* multiple of its width, 24, only"):
        save_pretrained(tmp_path / "new", module, params)
    assert not list(tmp_path.iterdir())


def write_siglip2(folder):
    """Writes a model in the layout of SigLIP 2's at a fixed resolution, and returns it."""
    shared = {"num_hidden_layers": 2, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
    text = {
        "model_type": "siglip_text_model",
        "hidden_size": 20,
        "intermediate_size": 44,
        "num_attention_heads": 2,
        "max_position_embeddings": 11,
        "projection_size": 24,
        "vocab_size": 40,
    }
    image = {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 52,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 7,
    }
    fields = {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {**shared, **text},
        "vision_config": {**shared, **image},
    }
    model = random_model(transformers.SiglipConfig(**fields))
    model.save_pretrained(folder)
    # As published, without what transformers adds to it.
    (folder / "config.json").write_text(json.dumps(fields))

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    merges = [("d", "o"), ("do", "g"), ("▁", "dog")]
    pieces += [first + second for first, second in merges]
    transformers.GemmaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
    ).save_pretrained(folder)
    return model


def test_siglip2_at_a_fixed_resolution_reads_what_its_tokenizer_gives(tmp_path):
    model = write_siglip2(tmp_path)
    config = tiny_config(
        encoder__image__pretrained=str(tmp_path),
        encoder__text__pretrained=str(tmp_path),
        encoder__image__image_size=28,
        data__tokenizer="auto",
        data__text_length=0,
    )
    assert config.encoder.text.pooling == "checkpoint" and config.image_mean == (0.5, 0.5, 0.5)

    tokenizer = load_tokenizer(config.data.tokenizer)
    captions = [clean_caption(text, 30) for text in ("A dog.", "Dogs in a field, and a dog")]
    ids, mask = tokenize(tokenizer, captions, config.data.text_length)
    # No token begins a text, and one ends it, whether it is padded or cut.
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["a", "▁dog", "<eos>"] + 8 * ["<pad>"]
    assert ids.shape == (2, 11) and ids[1, -1] == tokenizer.eos_token_id and mask.all()

    module, params = load_pretrained(tmp_path)
    pixels = pixels_of(28)
    ours = jax.jit(module.apply)({"params": params}, pixels, ids, mask)
    theirs = model(
        input_ids=torch.tensor(ids.astype(int)),
        pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
    )
    for embedding, expected in zip(ours, (theirs.image_embeds, theirs.text_embeds), strict=True):
        np.testing.assert_allclose(embedding, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [154, 224])
def test_a_published_dinov2_agrees(weights, image_size):
    folder = weights / "dinov2_small"
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    module, params = load_pretrained(folder, image_size=image_size)
    pixels = pixels_of(image_size)
    ours = jax.jit(module.apply)({"params": params}, pixels).last_hidden_state
    np.testing.assert_allclose(ours, hidden_states(model, pixels).detach(), rtol=0, atol=1e-3)

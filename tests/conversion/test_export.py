"""What is exported gives the run's own similarities, without this package."""

import html
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

from fne_jax import configuration, convert
from fne_jax.conversion import export, image_text_encoder
from fne_jax.data import captions
from fne_jax.data.sources.registry import load_split
from fne_jax.encoders.dual_encoder import POOLINGS
from fne_jax.errors import UserError
from fne_jax.model.model import build_model, initial_params
from fne_jax.parallel import sharding
from tests.support.tiny import tiny_config

CAPTIONS = [
    "A man-made <person>, in RED! " * 8,
    "it's (2) dogs/cats: w3 w4 w5",
    "w1",
    "w1  w2 w9",
    "caf\u00e9 &amp; [SEP] \u039f\u0394\u039f\u03a3",
]
# Two encoders of the golden folder, and fields of their config.
AUTHORS = ("trajectory/vit", "trajectory/bert"), {"encoder__text__pooling": "mean_with_padding"}
CLIP = ("clip", "clip"), {"encoder__image__image_size": 32, "data__prompt": "w2 "}
SIGLIP = ("siglip", "siglip"), {"encoder__image__image_size": 32, "encoder__projection_dim": 6}
LAYERS = (
    ("encoders/vit", "encoders/bert"),
    {
        "encoder__image__pooling": "first",
        "encoder__text__pooling": "mean",
        "encoder__image__pooled_layers": 2,
        "encoder__text__pooled_layers": 2,
        "data__resize_to": 25,
        "data__max_words": 3,
    },
)
EVALUATION = {
    "metrics": {"rsum": {"value": 212.5, "low": 200.0, "high": 220.0}},
    "data": {"pairs": 25, "images": 5, "checksum": "0123", "image_checksum": "4567"},
    **{"split": "test", "step": 3, "images": 5, "captions": 25},
}
# The text encoder a folder of sentence-transformers that ends in a dense layer.
HEADS = (
    ("encoders/vit", "sentences"),
    {
        "encoder__projection_dim": 6,
        "encoder__projection_hidden": 10,
        "encoder__image__lora_rank": 2,
        "encoder__image__pooling": "first_and_mean",
        "data__cleaning": "none",
        "objective__name": "clip",
        "objective__learn_temperature": True,
    },
)
SLOW = {"clip": CLIP, "authors": AUTHORS, "siglip": SIGLIP, "layers": LAYERS}
CASES = [pytest.param(*HEADS, id="heads")]
CASES += [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()]


@pytest.fixture
def run(golden, tmp_path, monkeypatch):
    """Returns a function that returns a model of random parameters, which `export` takes."""

    def run(towers, fields):
        sources = [golden / name for name in towers]
        if towers[1] == "sentences":
            sources[1] = with_dense_layer(golden / "encoders" / "bert", tmp_path / "sentences")
        tokenizer, train = tmp_path / "tokenizer", load_split(tiny_config().data, 8, "train")
        captions.fit_tokenizer(train.captions, 50).save_pretrained(tokenizer)
        config, architectures = configuration.resolve(
            tiny_config(
                encoder__image__pretrained=str(sources[0]),
                encoder__text__pretrained=str(sources[1]),
                data__tokenizer=str(tokenizer),
                data__text_length=12,
                **{"encoder__image__image_size": 16, **fields},
            )
        )
        loaded = captions.load_tokenizer(str(tokenizer))
        model = build_model(config, architectures, loaded, sharding.create_mesh())
        params, _ = initial_params(model.module, config, jax.random.key(0))
        leaves, tree = jax.tree.flatten(params)
        # Biases, norms and factors begin at 0 or 1, of which a mistake is not seen.
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noise = [0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
        model = model.with_params(jax.tree.map(jax.numpy.add, params, tree.unflatten(noise)))
        monkeypatch.setattr(export, "load_workdir", lambda *_: model)
        return model

    return run


def with_dense_layer(source, folder):
    """Makes a folder of sentence-transformers of an encoder."""
    kinds = ("Transformer", "Pooling", "Dense")
    contents = {
        "modules.json": [
            {"type": f"sentence_transformers.models.{kind}", "path": kind if number else ""}
            for number, kind in enumerate(kinds)
        ],
        "Pooling/config.json": {"pooling_mode": "max"},
        "Dense/config.json": {"out_features": 7},
    }
    shutil.copytree(source, folder)
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def images(tmp_path):
    """Files of images: upright, turned by EXIF, and transparent."""
    paths = [tmp_path / name for name in ("upright.jpg", "turned.jpg", "transparent.png")]
    for path, exif in zip(paths, (1, 6, 1), strict=True):
        mode = "RGBA" if path.suffix == ".png" else "RGB"
        pixels = np.random.default_rng(exif).integers(0, 256, (3, 5, len(mode)), np.uint8)
        image = Image.fromarray(pixels).resize((50, 30))
        image.getexif()[0x0112] = exif
        image.save(path, quality=95, exif=image.getexif())
    return paths


def exported(folder, *flags):
    """Exports the run into a folder; returns the blocks of code in its model card."""
    convert.main(["export", f"--workdir={folder.parent}", f"--out={folder}", *flags])
    blocks = (folder / "README.md").read_text().split("```python\n")[1:]
    return [block.split("```")[0] for block in blocks]


@pytest.mark.parametrize(("towers", "fields"), CASES)
def test_following_the_model_card_gives_the_similarities_of_the_run(
    run, images, tmp_path, monkeypatch, towers, fields
):
    model, out = run(towers, fields), tmp_path / "out"
    (tmp_path / "eval_test.json").write_text(json.dumps(EVALUATION))
    code = exported(out)[0]
    card = (out / "README.md").read_text()
    assert "| rsum | 212.50 | 200.00-220.00 |" in card and "(checksum 0123, of" in card
    shutil.copy(images[0], out / "beach.jpg")
    monkeypatch.chdir(out)
    monkeypatch.syspath_prepend(str(out))
    monkeypatch.delitem(sys.modules, "image_text_encoder", raising=False)
    names = {}
    exec(code, names)
    encoder = names["encoder"]
    ours = model.embed_images(images) @ model.embed_texts(CAPTIONS).T
    theirs = encoder.embed_images(images) @ encoder.embed_texts(CAPTIONS).T
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    (out / "text.stablehlo").touch()
    encoder.save(tmp_path / "again")  # perhaps with other weights than the programs'
    assert not (tmp_path / "again" / "text.stablehlo").exists()
    assert encoder.get_embedding_dimension() == names["texts"].shape[-1]
    assert ("logit_scale" in encoder.settings) == (model.config.objective.name == "clip")
    # By transformers' own classes as well: a JPEG as it is, and captions that begin with no prompt.
    places = [out / encoder.settings[tower]["folder"] for tower in ("image", "text")]
    processor = transformers.AutoImageProcessor.from_pretrained(places[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(places[1])
    prompt = model.config.data.prompt
    if not model.config.data.resize_to:
        upright = Image.open(images[0])
        pixels = processor(upright, return_tensors="np")["pixel_values"]
        ours = encoder.preprocess([upright])["pixel_values"]
        np.testing.assert_allclose(pixels, ours, atol=1e-5)
    texts = [prompt + text for text in CAPTIONS[:-1]]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="np")
    np.testing.assert_array_equal(
        tokens["input_ids"], encoder.preprocess(CAPTIONS[:-1])["input_ids"]
    )


# Letters of all kinds, and all that cleaning looks at. HTML's entities begin with &.
LETTERS = st.sampled_from(
    "aBw \t\n\u00a0\u2003\x1c\x85,.'!?\"()*#:;~-/<>&\u0130\u03a3\u00c9e\u0301"
)
TEXTS = st.lists(st.one_of(LETTERS, st.characters(codec="utf-8"), st.just("<person>")))


@pytest.mark.parametrize("cleaning", captions.CLEANINGS)
@given(letters=TEXTS, max_words=st.integers(0, 3))
@example(letters="a\u03a3\u0301a \u03a3\u03a3' a.\u03a3", max_words=0)
def test_the_normalizer_cleans_as_the_run_does(cleaning, letters, max_words):
    text = "".join(letters)
    if html.unescape(text) == text:
        normalized = export.cleaning_normalizer(cleaning, max_words).normalize_str(text)
        assert normalized == captions.clean_caption(text, max_words, cleaning)


SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<mask>"]
CHARACTERS = "acdeghimnoprstw12345ADEIMNRS<>\u00e9"
BYTES, PIECES = (
    {piece: number for number, piece in enumerate([*SPECIAL, *pieces])}
    for pieces in (ByteLevel.alphabet(), [*CHARACTERS, *(f"##{x}" for x in CHARACTERS)])
)


@pytest.mark.parametrize(
    "tokenizer",
    [
        transformers.RobertaTokenizer(vocab=BYTES, merges=[]),
        transformers.BertTokenizer(vocab=PIECES),
        transformers.XLMRobertaTokenizer(vocab=[(piece, -1.0) for piece in [*PIECES, "\u2581"]]),
    ],
    ids=["roberta", "bert", "xlm_roberta"],
)
def test_a_tokenizer_of_any_type_cleans_when_it_is_opened_again(tokenizer, tmp_path):
    cleaned = [captions.clean_caption(text, 30) for text in CAPTIONS[:-1]]
    expected = captions.tokenize(tokenizer, cleaned, 12)
    config = tiny_config(data__text_length=12)
    export._write_tokenizer(tmp_path, SimpleNamespace(tokenizer=tokenizer, config=config))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = captions.tokenize(again, CAPTIONS[:-1], again.model_max_length)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found[0])) > 8
    np.testing.assert_array_equal(captions.tokenize(tokenizer, cleaned, 12), expected)


# The package in the way of an import, as where it is not installed.
ALONE = """
import sys; sys.modules["fne_jax"] = None
exec(sys.argv[1])
import numpy; from PIL import Image
paths, texts = sys.argv[2:5], sys.argv[5:]
"""
IN_PYTORCH = "similarity = encoder.embed_images(paths) @ encoder.embed_texts(texts).T"
# And once more after saving.
IN_SENTENCE_TRANSFORMERS = """
embedded = model.encode(texts)
similarity = model.encode([*map(Image.open, paths)]) @ embedded.T
model.save("again")
again = SentenceTransformer("again", trust_remote_code=True).encode(texts)
numpy.testing.assert_allclose(again, embedded, atol=1e-5)
"""


BESIDE = "not beside the suite's own packages: .ci/run"


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 1], ids=["pytorch", "sentence_transformers"])
def test_a_folder_needs_nothing_of_this_package(run, images, tmp_path, block):
    if block:
        pytest.importorskip("sentence_transformers", reason=BESIDE)
    model, out = run(*HEADS), tmp_path / "out"
    code = exported(out)[block]
    shutil.copy(images[0], out / "beach.jpg")
    script = ALONE + (IN_PYTORCH, IN_SENTENCE_TRANSFORMERS)[block]
    script += "\nnumpy.save('similarity.npy', similarity)"
    command = [sys.executable, "-c", script, code, *map(str, images), *CAPTIONS]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(command, cwd=out, env=environment, check=True)
    ours = model.embed_images(images) @ model.embed_texts(CAPTIONS).T
    np.testing.assert_allclose(np.load(out / "similarity.npy"), ours, atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_module_pools_as_the_run_does(pooling):
    hidden = np.random.default_rng(0).normal(size=(3, 7, 4)).astype(np.float32)
    mask = np.arange(7)[None] < np.array([[3], [1], [5]])
    found = image_text_encoder._POOLINGS[pooling](*map(torch.tensor, (hidden, 1 * mask[..., None])))
    np.testing.assert_allclose(found, POOLINGS[pooling](hidden, mask), atol=1e-6)


WITHOUT = "import sys; sys.modules |= dict.fromkeys(['fne_jax', 'jax', 'torch'])\n"


@pytest.mark.slow
@pytest.mark.parametrize(("towers", "fields"), [HEADS, SLOW["siglip"], SLOW["layers"]])
def test_onnx_files_need_neither_this_package_nor_pytorch(run, tmp_path, towers, fields):
    pytest.importorskip("onnxruntime", reason=BESIDE)
    model, out = run(towers, fields), tmp_path / "out"
    code, ours = exported(out, "--onnx")[2], "a dog runs along the beach"
    # In the tokenizer's words as well, which this caption's are not.
    script = f"{code}\nboth = [texts]\n{code.replace(ours, 'w4 w5 w3')}\nboth.append(texts)"
    save = "\nnp.save('similarity.npy', images @ np.concatenate(both).T)"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(out / "beach.jpg")
    subprocess.run([sys.executable, "-c", WITHOUT + script + save], cwd=out, check=True)
    expected = model.embed_images(out / "beach.jpg") @ model.embed_texts([ours, "w4 w5 w3"]).T
    np.testing.assert_allclose(np.load(out / "similarity.npy"), expected, atol=1e-4)


@pytest.mark.slow
def test_onnx_files_that_differ_from_the_run_are_refused(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason=BESIDE)
    run(*HEADS)
    monkeypatch.setitem(image_text_encoder._POOLINGS, "max", lambda hidden, mask: hidden.amax(1))
    with pytest.raises(UserError, match=r"the embeddings of text\.onnx differ from the run's"):
        exported(tmp_path / "out", "--onnx")
    assert not [*tmp_path.glob("out*")]


def test_a_package_that_onnx_takes_is_named_before_a_run_is_read(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "fne_jax.conversion.onnx", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"--onnx needs onnx.*: pip .*\[onnx\]"):
        exported(tmp_path / "out", "--onnx")


RUN = """
import sys; sys.modules['fne_jax'] = sys.modules['flax'] = None
import jax, numpy as np
image, text = (
    jax.export.deserialize(bytearray(open(f"out/{tower}.stablehlo", "rb").read())).call
    for tower in ("image", "text")
)
inputs = np.load("inputs.npz")
np.save("similarity.npy", image(inputs["pixels"]) @ text(inputs["ids"], inputs["mask"]).T)
"""


def test_programs_need_jax_alone(run, images, tmp_path, monkeypatch):
    model, out = run(*HEADS), tmp_path / "out"
    command = ["export", f"--workdir={tmp_path}", f"--out={out}", "--stablehlo"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(export, "write_stablehlo", lambda *_: 1 / 0)
        convert.main(command)
    assert not [*tmp_path.glob("out*")]  # all of it or nothing
    convert.main(command)
    pixels = np.stack([model.read_image(path, "") for path in images])
    ids, mask = model.tokenize(CAPTIONS, 20)
    np.savez(tmp_path / "inputs.npz", pixels=pixels, ids=ids, mask=mask)
    subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, check=True)
    ours = model.embed_images(images) @ model.embedder.texts(model.params, (ids, mask)).T
    np.testing.assert_allclose(np.load(tmp_path / "similarity.npy"), ours, atol=1e-5)

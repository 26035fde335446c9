"""A run's encoders for transformers and sentence-transformers, with a model card."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tokenizers import Regex, normalizers

from fne_jax.conversion.stablehlo import write_stablehlo
from fne_jax.data import captions as caption_lib
from fne_jax.data.identity import DatasetIdentity
from fne_jax.data.sources.registry import data_of
from fne_jax.encoders.dual_encoder import CHECKPOINT
from fne_jax.encoders.freezing import TOWERS
from fne_jax.encoders.model_types import MODELS
from fne_jax.encoders.pretrained_weights import save_pretrained
from fne_jax.errors import needs_extra
from fne_jax.files import check_new_folder, whole_folder, write_atomically
from fne_jax.model.model import load_workdir
from fne_jax.objectives.learned_scalars import LEARNED, bias, temperature
from fne_jax.objectives.registry import OBJECTIVES

# The PyTorch module that is copied, the files that it reads, and its one import of ours.
_MODULE = pathlib.Path(__file__).with_name("image_text_encoder.py")
SETTINGS, _HEADS = "image_text_encoder.json", "heads.safetensors"
_IMPORT = "from fne_jax.data.captions import clean_caption\n"
_TOKENIZER = "tokenizer_config.json"

_CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, image-text-retrieval, false-negative-elimination]
# Nobody has said. Look at the licences of all that is named under "Limits", and put yours here.
license: unknown
---
# Image-text retrieval encoders trained with FNE-JAX

Step {step}. Captions and image files as they are become the embeddings of the run, [n, {dim}] of
length 1. In this folder, with PyTorch, transformers 5 and Pillow:

```python
from image_text_encoder import ImageTextEncoder

encoder = ImageTextEncoder.load(".")
images = encoder.embed_images(["beach.jpg"])
texts = encoder.embed_texts(["a dog runs along the beach"])
print(images @ texts.T)
```

The same with [sentence-transformers](https://sbert.net):

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

# It runs image_text_encoder.py, which you may want to read first.
model = SentenceTransformer(".", trust_remote_code=True)
images = model.encode([Image.open("beach.jpg")])
texts = model.encode(["a dog runs along the beach"])
print(model.similarity(images, texts))
```
{onnx}
{opened} What else becomes of an image and a caption is code in `image_text_encoder.py`: it stores
images as the run did (upright, on white, as JPEG), cleans captions, pools and projects. {cleans}

## Metrics

{metrics}

## Limits

- Images become squares of {side} x {side} pixels, whatever their shape, and captions are cut to
  {text_length} tokens{words}.
- Trained on {train}. On other images, or with captions in another style or language, scores may be
  far lower.
- The encoders began as {sources}.
- The run computed in {dtype}; these weights are float32.

## Config

```json
{config}
```
"""
_ONNX = """
The same without PyTorch, with onnxruntime, transformers and Pillow:

```python
import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

image, text = (onnxruntime.InferenceSession(f"{{tower}}.onnx") for tower in ("image", "text"))
processor = AutoImageProcessor.from_pretrained("{image}")
tokenizer = AutoTokenizer.from_pretrained("{text}")

pixels = processor([Image.open("beach.jpg")], return_tensors="np")["pixel_values"]
captions = [{caption}]
tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")
ids = tokens["input_ids"]
mask = tokens.get("attention_mask", np.ones_like(ids))
images = image.run(None, {{"pixel_values": pixels}})[0]
texts = text.run(None, {{"input_ids": ids, "attention_mask": mask}})[0]
print(images @ texts.T)
```

Batches may have any number of rows and up to {most} tokens; the run padded to {padded}. Images
other than upright RGB JPEGs{large}, and {texts}, first need what
`image_text_encoder.py` does to them.
"""
_PAIR = "`AutoModel`, `AutoProcessor` and the like open this folder."
_APART = """`AutoModel` opens `image` and `text` (their pooler, which it misses, is not used), and
`AutoImageProcessor` and `AutoTokenizer` open theirs."""
_CLEANS = """The
tokenizer cleans captions by its own normalizers as well, but leaves HTML's entities (`&amp;`) as
they are, and finds special tokens (`[SEP]`) before it cleans{prompt}."""


def export(
    workdir: pathlib.Path,
    checkpoint: str,
    out: pathlib.Path,
    *,
    stablehlo: bool = False,
    onnx: bool = False,
) -> list[pathlib.Path]:
    """Writes both encoders, the tokenizer, what else makes an embedding, and README.md.

    CLIP and SigLIP become one model, in `out` itself; other pairs one model each, in `out/image`
    and `out/text`. `out/image_text_encoder.py` is a PyTorch module of both with all that goes on
    around them: cleaning, resizing, pooling, projecting. sentence-transformers opens `out` by it.

    Args:
      workdir: The folder of the run.
      checkpoint: `best`, `latest` or a step.
      out: The folder to make, which is empty or not there; after an error nothing is in it.
      stablehlo: Whether to write the programs of `write_stablehlo` as well.
      onnx: Whether to write the files of `write_onnx` as well.

    Returns:
      The folders that transformers can open.

    Raises:
      UserError: if there is no such run, transformers has no model of an encoder by itself, the
        folder has files already, or ONNX files need a package or are not those of the run.
    """
    check_new_folder(out, "--out")
    more = [write_stablehlo] if stablehlo else []
    if onnx:
        with needs_extra("onnx", "--onnx"):
            from fne_jax.conversion.onnx import write_onnx
        more.append(write_onnx)
    model = load_workdir(workdir, checkpoint)
    with whole_folder(out.resolve()) as scratch:
        folders = _write(scratch, workdir, model, onnx)
        for write in more:
            write(model, scratch)
    return sorted({out / folder for folder in folders})


def _write(out, workdir, model, onnx):
    """Writes a folder but for its programs; returns the names of the towers' folders in it."""
    module, params = model.module.clone(projection_dim=0), {}
    weights: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {tower: _head(model, tower, weights) for tower in TOWERS}
    for tower in TOWERS:
        params[tower] = dict(model.params[tower])
        if params[tower].pop("sentence_head", None):
            bare = getattr(module, tower).clone(sentence_head=None)
            module = module.clone(**{tower: bare})
    kinds = tuple(type(getattr(module, tower)) for tower in TOWERS)
    scalars = next((one.scalars for one in MODELS.values() if one.towers == kinds), None)
    learned = _scalars(model)
    if scalars is None:
        folders = [out / tower for tower in TOWERS]
        for tower, folder in zip(TOWERS, folders, strict=True):
            save_pretrained(folder, getattr(module, tower), params[tower])
    else:
        folders = [out, out]
        # Of an objective without them, the config's.
        now = {name: jnp.reshape(learned[name], first.shape) for name, first in scalars.items()}
        save_pretrained(out, module, params | now)
    _write_preprocessor(folders[0], model)
    _write_tokenizer(folders[1], model)
    config = model.config
    for tower, folder in zip(TOWERS, folders, strict=True):
        settings[tower]["folder"] = os.path.relpath(folder, out)
    settings |= {
        name: config.data[name] for name in ("resize_to", "cleaning", "max_words", "prompt")
    }
    settings["dim"] = model.embed_texts([]).shape[-1]
    of_objective = OBJECTIVES[config.objective.name].settings(config)
    for name, setting in (("logit_scale", "temperature"), ("logit_bias", "bias")):
        if setting in of_objective:
            settings[name] = float(learned[name])
    source = _MODULE.read_text("utf-8")
    cleaning = "import html\nimport re\nimport unicodedata\n\n\n"
    cleaning += inspect.getsource(caption_lib.clean_caption)
    contents = {
        _MODULE.name: source.replace(_IMPORT, cleaning),
        SETTINGS: _json(settings),
        # By which sentence-transformers opens the folder.
        "modules.json": _json(
            [{"idx": 0, "name": "0", "path": "", "type": f"{_MODULE.stem}.ImageTextEncoder"}]
        ),
        "config_sentence_transformers.json": _json({"similarity_fn_name": "cosine"}),
        "README.md": _model_card(workdir, model, settings, onnx),
    }
    for name, content in contents.items():
        write_atomically(out / name, content)
    if weights:
        write_atomically(out / _HEADS, safetensors.numpy.save(weights))
    return [settings[tower]["folder"] for tower in TOWERS]


def cleaning_normalizer(cleaning: str, max_words: int) -> normalizers.Normalizer:
    """Returns what cleans texts as `clean_caption` does, but leaves HTML's entities as they are.

    Args:
      cleaning: As for `clean_caption`.
      max_words: As for `clean_caption`.
    """
    steps: list[normalizers.Normalizer] = [normalizers.NFC()]
    if cleaning != caption_lib.NONE:
        # The one letter whose lower case depends on its neighbours, in Python alone: Unicode's
        # Final_Sigma (The Unicode Standard, table 3-17).
        cased, between = r"[\p{Cased}&&[^\p{Case_Ignorable}]]", r"\p{Case_Ignorable}*"
        final = Regex(rf"{cased}{between}\K\u03a3(?!{between}{cased})")
        steps += [normalizers.Replace(final, "\u03c2"), normalizers.Lowercase()]
    if cleaning == caption_lib.AUTHORS:
        steps += [
            normalizers.Replace(Regex("[-/]"), " "),
            normalizers.Replace(Regex(r"""[,.'!?"()*#:;~]"""), ""),
            normalizers.Replace("<person>", "person"),
        ]
    # What Python splits words at.
    steps += [normalizers.Replace(Regex(r"[\s\x1c-\x1f]+"), " "), normalizers.Strip()]
    if max_words:
        rest = Regex(rf"^\S+(?: \S+){{{max_words - 1}}}\K .*$")
        steps.append(normalizers.Replace(rest, ""))
    return normalizers.Sequence(steps)


def _head(model, tower, weights):
    """Returns how a tower is pooled and which layers follow; their weights are added to others."""
    settings, params, layers = model.config.encoder[tower], model.params, []
    pooling, head = settings.pooling, getattr(getattr(model.module, tower), "sentence_head", None)
    if head and pooling == CHECKPOINT:
        pooling = head.pooling
        for index, layer in enumerate(head.layers):
            layers.append(("linear", params[tower]["sentence_head"][f"dense_{index}"]))
            layers.append((layer.activation.lower(), {}))
    projection = params.get(f"{tower}_projection", {})
    if "output" in projection:
        layers += [("norm", projection["norm"]), ("linear", projection["hidden"])]
        layers += [("gelu", {}), ("linear", projection["output"])]
    elif projection:
        layers.append(("linear", projection))
    names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    described = []
    for index, (kind, arrays) in enumerate(layers):
        sizes = {name: np.shape(array) for name, array in arrays.items()}
        bias_or_none = ["bias" in arrays] if kind == "linear" else []
        described.append([kind, *sizes.get("kernel", sizes.get("scale", ())), *bias_or_none])
        for name, array in arrays.items():
            transposed = np.asarray(array, np.float32).T
            weights[f"{tower}.{index}.{names[name]}"] = np.ascontiguousarray(transposed)
    return {"pooling": pooling, "pooled_layers": settings.pooled_layers, "head": described}


def _scalars(model):
    """Returns the logit scale and bias of the run's objective by now, as the pair names them."""
    objective, learned = model.config.objective, model.params.get(LEARNED)
    return {
        "logit_scale": -jnp.log(temperature(objective.temperature, learned)),
        "logit_bias": bias(objective.bias, learned),
    }


def _write_preprocessor(folder, model):
    """Writes what resizes and normalises pixels as the run does."""
    side = model.config.encoder.image.image_size
    fields = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(model.config.image_mean),
        "image_std": list(model.config.image_std),
    }
    write_atomically(folder / "preprocessor_config.json", _json(fields))


def _write_tokenizer(folder, model):
    """Writes the tokenizer, to cut captions to the run's length and, if it is fast, clean them."""
    tokenizer, data = model.tokenizer, model.config.data
    # Fitted tokenizers know no limit, and others may know a larger one.
    tokenizer.model_max_length = model.config.evaluation.text_length
    if not tokenizer.is_fast:
        tokenizer.save_pretrained(folder)
        return
    backend = tokenizer.backend_tokenizer
    own, cleaning = backend.normalizer, cleaning_normalizer(data.cleaning, data.max_words)
    backend.normalizer = normalizers.Sequence([cleaning, own]) if own else cleaning
    tokenizer.save_pretrained(folder)
    backend.normalizer = own
    # Those of a model type make their normalizer anew, whatever the file says.
    about = json.loads((folder / _TOKENIZER).read_text("utf-8"))
    write_atomically(folder / _TOKENIZER, _json(about | {"tokenizer_class": "TokenizersBackend"}))


def _model_card(workdir, model, settings, onnx):
    config, train, tables = model.config, model.data.get("train"), []
    for path in sorted(workdir.glob("eval_*.json")):
        report = json.loads(path.read_text("utf-8"))
        data = DatasetIdentity(**report["data"]) if "data" in report else "data nobody recorded"
        tables.append(
            f"{report['split']} split of {_name(config, report['split'])}, step {report['step']}, "
            f"{report['images']} images, {report['captions']} captions: {data}\n\n"
            "| metric | value | 95 % interval |\n| --- | --- | --- |"
        )
        for name, one in report["metrics"].items():
            tables[-1] += f"\n| {name} | {one['value']:.2f} | {one['low']:.2f}-{one['high']:.2f} |"
    max_words, prompt = config.data.max_words, config.data.prompt
    cleans = _CLEANS.format(prompt=f"; {prompt!r} goes before each" if prompt else "")
    folders = {tower: settings[tower]["folder"] for tower in TOWERS}
    large, text_length = config.data.resize_to, config.evaluation.text_length
    files = _ONNX.format(
        **folders,
        caption=json.dumps(f"{prompt}a dog runs along the beach", ensure_ascii=False),
        most=model.module.text.max_tokens,
        padded=text_length,
        large=f" whose shorter side has at most {large} pixels" if large else "",
        texts="captions with HTML's entities" if model.tokenizer.is_fast else "all captions",
    )
    return _CARD.format(
        step=model.step,
        dim=settings["dim"],
        onnx=files if onnx else "",
        opened=_APART if folders["image"] != folders["text"] else _PAIR,
        cleans=cleans if model.tokenizer.is_fast else "",
        metrics="\n\n".join(tables) or "Not evaluated.",
        side=config.encoder.image.image_size,
        text_length=text_length,
        words=f" and {max_words} words" if max_words else "",
        train=_name(config, "train") + (f": {train}" if train else ""),
        sources=" and ".join(config.encoder[tower].pretrained or "random" for tower in TOWERS),
        dtype=config.encoder.compute_dtype,
        config=json.dumps(json.loads(config.to_json()), indent=2),
    )


def _name(config, split):
    """Returns what a split's data are called: their source, and the name of their folder."""
    data = data_of(config.data, split)
    return f"{data.source} {pathlib.Path(data.dir).name}".strip()


def _json(content):
    return json.dumps(content, indent=2) + "\n"

"""A run's encoders in Hugging Face's layout, with a model card."""

from __future__ import annotations

import inspect
import json
import pathlib

import jax.numpy as jnp

from fne_jax.data import captions as caption_lib
from fne_jax.encoders.architectures import model_type_of
from fne_jax.encoders.dual_encoder import CHECKPOINT, FIRST_AND_MEAN, LONGEST_POOLING
from fne_jax.encoders.model_types import MODELS
from fne_jax.encoders.pretrained_weights import save_pretrained
from fne_jax.errors import UserError
from fne_jax.evaluation.results import read_values
from fne_jax.files import write_atomically
from fne_jax.model.model import load_workdir
from fne_jax.objectives.learned_scalars import LEARNED, bias, temperature, towers_of

_CARD = """---
library_name: transformers
tags: [image-text-retrieval, false-negative-elimination]
---
# Image-text retrieval encoders trained with FNE-JAX

Step {step}. Run in this folder, this code gives the embeddings of the run, [n, dim] of length 1,
from captions and image files as they are. (Lay transparent images on white first.)

```python
import io
import html
import re
import unicodedata

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps

tokenizer = transformers.AutoTokenizer.from_pretrained("{text_folder}")
text_model = transformers.AutoModel.from_pretrained("{text_folder}").eval()
image_model = transformers.AutoModel.from_pretrained("{image_folder}").eval()


{clean}


@torch.no_grad()
def embed_texts(captions):
    tokens = tokenizer(
        [{cleaned} for caption in captions],
        padding="max_length",
        truncation=True,
        max_length={text_length},
        return_tensors="pt",
    )
    mask = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"]))
    out = text_model{text_call}(input_ids=tokens["input_ids"], attention_mask=mask{text_options})
    {text_hidden}
    return torch.nn.functional.normalize({text_pooled}, dim=-1)


def read(path):
    # As the run stored it: an upright RGB JPEG, of quality 95 unless it was one.
    image, resize_to = Image.open(path), {resize_to}
    upright, large = image.getexif().get(0x0112, 1) == 1, 0 < resize_to < min(image.size)
    if image.format in ("JPEG", "MPO") and image.mode == "RGB" and upright and not large:
        return image
    image = ImageOps.exif_transpose(image).convert("RGB")
    if large:
        scale = resize_to / min(image.size)
        size = [max(resize_to, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=95)
    return Image.open(stored)


@torch.no_grad()
def embed_images(paths):
    images = [read(path).resize(({side}, {side}), Image.Resampling.BICUBIC) for path in paths]
    pixels = (np.stack(images) / 255 - {mean}) / {std}
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    out = image_model{image_call}(pixel_values=pixels{image_options})
    {image_hidden}
    return torch.nn.functional.normalize({image_pooled}, dim=-1)
```

## Metrics

{metrics}

## Config

```json
{config}
```
"""
# Of the hidden states, and of the mask where they are of captions.
_POOLED = {
    CHECKPOINT: "out.pooler_output",
    "mean": "(hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
    "mean_with_padding": "hidden.mean(1)",
    LONGEST_POOLING: "hidden[:, : mask.sum(1).max()].mean(1)",
    "first": "hidden[:, 0]",
    "max": "hidden.masked_fill(mask[..., None] == 0, -1e9).amax(1)",
    FIRST_AND_MEAN: "torch.cat([hidden[:, 0], (hidden * mask[..., None])[:, 1:].sum(1) / "
    "mask[:, 1:].sum(1, keepdim=True)], -1)",
}
_LAYERS = """norm = getattr({name}, "layernorm", getattr({name}, "norm", lambda hidden: hidden))
    layers = [norm(layer) for layer in out.hidden_states[-{count}:-1]]
    hidden = torch.cat([*layers, out.last_hidden_state], -1)"""


def export(workdir: pathlib.Path, checkpoint: str, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes both encoders, the tokenizer and README.md.

    CLIP and SigLIP become one model, in `out` itself; other pairs one model each, in `out/image`
    and `out/text`. What goes on around these models (cleaning, resizing, pooling, L2 normalisation)
    is code in README.md.

    Args:
      workdir: The folder of the run.
      checkpoint: `best`, `latest` or a step.
      out: The folder to make.

    Returns:
      The folders that transformers can open.

    Raises:
      UserError: if there is no such run, or a projection of ours follows its encoders.
    """
    model = load_workdir(workdir, checkpoint)
    config, module = model.config, model.module
    if config.encoder.projection_dim:
        raise UserError(
            f"{workdir}: its encoders end in a projection of "
            f"{config.encoder.projection_dim} dimensions, which transformers' models have no place "
            "for; use fne_jax.load_workdir"
        )
    if module.image.pooled_dim and module.text.pooled_dim:
        folders = [out]
        save_pretrained(out, module, towers_of(model.params) | _scalars(model))
    else:
        folders = [out / "image", out / "text"]
        save_pretrained(out / "image", module.image, model.params["image"])
        save_pretrained(out / "text", module.text, model.params["text"])
    # Fitted tokenizers know no limit, and others may know a larger one.
    model.tokenizer.model_max_length = config.evaluation.text_length
    model.tokenizer.save_pretrained(folders[-1])
    write_atomically(out / "README.md", _model_card(workdir, model))
    return folders


def _scalars(model):
    """Returns the logit scale and bias of the run's objective by now, as the pair names them."""
    objective, learned = model.config.objective, model.params.get(LEARNED)
    now = {
        "logit_scale": -jnp.log(temperature(objective.temperature, learned)),
        "logit_bias": bias(objective.bias, learned),
    }
    scalars = MODELS[model_type_of(model.module)].scalars
    return {name: jnp.reshape(now[name], start.shape) for name, start in scalars.items()}


def _encoding(model, tower):
    """Returns the card's lines that run a tower and pool what it gives."""
    pooling, count = (model.config.encoder[tower][name] for name in ("pooling", "pooled_layers"))
    part = {"image": "vision_model", "text": "text_model"}[tower]
    if pooling == CHECKPOINT:
        part, hidden = f"get_{tower}_features", ""
    elif count > 1:
        hidden = _LAYERS.format(name=f"{tower}_model", count=count)
    else:
        hidden = "hidden = out.last_hidden_state"
    if hidden and tower == "image":
        hidden += "\n    mask = torch.ones(hidden.shape[:2])"
    pair = model.module.image.pooled_dim and model.module.text.pooled_dim
    return {
        f"{tower}_folder": "." if pair else tower,
        f"{tower}_call": f".{part}" if pair else "",
        f"{tower}_options": ", output_hidden_states=True" if count > 1 else "",
        f"{tower}_hidden": hidden,
        f"{tower}_pooled": _POOLED[pooling],
    }


def _model_card(workdir, model) -> str:
    config = model.config
    cleaned = f"clean_caption(caption, {config.data.max_words}, {config.data.cleaning!r})"
    if config.data.prompt:
        cleaned = f"({config.data.prompt!r} + {cleaned}).strip()"
    tables = []
    for path in sorted(workdir.glob("eval_*.json")):
        report = json.loads(path.read_text())
        rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in read_values(report).items())
        tables.append(
            f"{report['split']}, step {report['step']}, {report['images']} images, "
            f"{report['captions']} captions\n\n| metric | value |\n| --- | --- |\n{rows}"
        )
    return _CARD.format(
        step=model.step,
        resize_to=config.data.resize_to,
        clean=inspect.getsource(caption_lib.clean_caption).strip(),
        cleaned=cleaned,
        text_length=config.evaluation.text_length,
        side=config.encoder.image.image_size,
        mean=list(config.image_mean),
        std=list(config.image_std),
        metrics="\n\n".join(tables) or "Not evaluated.",
        config=json.dumps(json.loads(config.to_json()), indent=2),
        **_encoding(model, "image"),
        **_encoding(model, "text"),
    )

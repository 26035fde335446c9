"""A run's encoders in Hugging Face's layout, with a model card."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp

from fne_jax.encoders.architectures import model_type_of
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

{about}

## Metrics

{metrics}

## Config

```json
{config}
```
"""


def export(workdir: pathlib.Path, checkpoint: str, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes both encoders, the tokenizer and README.md.

    CLIP and SigLIP become one model, in `out` itself; other pairs one model each, in `out/image`
    and `out/text`. Pooling and L2 normalisation are not part of these models: README.md says which.

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


def _pooling(tower):
    of = f" of the last {tower.pooled_layers} layers" if tower.pooled_layers > 1 else ""
    return f"{tower.pooling}{of}"


def _model_card(workdir, model) -> str:
    config = model.config
    about = (
        f"Step {model.step}. An embedding is the pooled last hidden state divided by its L2 "
        f"norm; pooling: images {_pooling(config.encoder.image)}, texts "
        f"{_pooling(config.encoder.text)}. Pixels in [0, 1] are resized to "
        f"{config.encoder.image.image_size} x {config.encoder.image.image_size} (bicubic) and "
        f"normalised with mean {tuple(config.image_mean)} and deviation "
        f"{tuple(config.image_std)}; texts have {config.data.text_length} tokens."
    )
    tables = []
    for path in sorted(workdir.glob("eval_*.json")):
        report = json.loads(path.read_text())
        rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in read_values(report).items())
        tables.append(
            f"{report['split']}, step {report['step']}, {report['images']} images, "
            f"{report['captions']} captions\n\n| metric | value |\n| --- | --- |\n{rows}"
        )
    return _CARD.format(
        about=about,
        metrics="\n\n".join(tables) or "Not evaluated.",
        config=json.dumps(json.loads(config.to_json()), indent=2),
    )

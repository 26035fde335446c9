"""The two towers that a config names: from random weights by their sizes, or pretrained."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from fne_jax.encoders.architectures import build_from_architecture, read_architecture
from fne_jax.encoders.bert import Bert, TextTower
from fne_jax.encoders.dual_encoder import CHECKPOINT, FIRST_AND_MEAN, POOLINGS, DualEncoder
from fne_jax.encoders.freezing import TOWERS, parse_frozen_layers
from fne_jax.encoders.pretrained_weights import load_pretrained, read_scalars
from fne_jax.encoders.transformer import ALL, Tower
from fne_jax.encoders.vision_transformer import VisionTower, VisionTransformer
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, write_atomically

# In a run's workdir, so that it is restored without the hub: the config.json of each pretrained
# tower's source.
DIRECTORY = "towers"


def read_architectures(
    encoder: ml_collections.ConfigDict, workdir: pathlib.Path | None = None
) -> dict[str, dict[str, Any]]:
    """Returns the config.json of each pretrained tower: the run's own copy, else the source's.

    That of a CLIP or SigLIP also has `scalars`: what `read_scalars` returns. `encoder` is
    `config.encoder`. Raises UserError if a pretrained source does not exist.
    """
    found = {}
    for tower in TOWERS:
        source = encoder[tower].pretrained
        if not source:
            continue
        path = None if workdir is None else workdir / DIRECTORY / f"{tower}.json"
        if path is not None and path.is_file():
            found[tower] = json.loads(path.read_text())
            continue
        with as_user_error(f"config.encoder.{tower}.pretrained", errors=UserError):
            found[tower] = read_architecture(source)
            scalars = read_scalars(source, found[tower].get("model_type"))
        found[tower] |= {"scalars": scalars} if scalars else {}
    return found


def store_architectures(
    architectures: Mapping[str, Mapping[str, Any]], workdir: pathlib.Path
) -> None:
    """Keeps the towers' config.json in a run's workdir, where `read_architectures` looks."""
    for tower, architecture in architectures.items():
        path = workdir / DIRECTORY / f"{tower}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(architecture, indent=2) + "\n")


def build_dual_encoder(
    encoder: ml_collections.ConfigDict,
    vocab_size: int,
    architectures: Mapping[str, Mapping[str, Any]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> DualEncoder:
    """Returns the model that `config.encoder` describes, for a tokenizer of so many ids.

    `architectures` is what `read_architectures` returned, for towers that are pretrained; over the
    devices of the mesh batches are split, None for the default device alone. Raises UserError,
    naming the field, if sizes do not fit together, or a tower lacks what is asked.
    """
    towers = {
        name: _tower(encoder, name, (architectures or {}).get(name), vocab_size).clone(mesh=mesh)
        for name in TOWERS
    }
    image, text = towers.values()
    if text.vocab_size < vocab_size:
        raise UserError(
            f"config.data.tokenizer has {vocab_size} token ids, more than the {text.vocab_size} "
            f"of config.encoder.text.pretrained; take the tokenizer of that model"
        )
    widths = [_pooled_width(name, tower, encoder[name]) for name, tower in towers.items()]
    if widths[0] != widths[1] and not encoder.projection_dim:
        raise UserError(
            f"the towers' widths differ ({widths[0]} and {widths[1]}, with "
            f"config.encoder.image.pooling={encoder.image.pooling} and "
            f"config.encoder.text.pooling={encoder.text.pooling}); make them equal or set "
            "config.encoder.projection_dim"
        )
    return DualEncoder(
        image=image,
        text=text,
        image_pooling=encoder.image.pooling,
        text_pooling=encoder.text.pooling,
        projection_dim=encoder.projection_dim,
        projection_hidden=encoder.projection_hidden,
    )


def _pooled_width(name, tower, settings):
    """Returns the width of what a tower is pooled to, as its settings say."""
    field, count = f"config.encoder.{name}.pooled_layers", tower.pooled_layers
    if count > 1 and tower.pooled_dim:
        raise UserError(
            f"{field} is {count}, but that tower has an embedding of its own, of its last layer; "
            "expected 1"
        )
    below = 0 if tower.frozen_layers == ALL else tower.frozen_depth
    most = max(tower.layers - below, 1)
    if count > most:
        raise UserError(
            f"{field} is {count}; expected at most {most}, the layers of that tower"
            + (" that are not frozen" if below else "")
        )
    for kind in ("pooling", "training_pooling"):
        if settings.get(kind) == CHECKPOINT and not tower.pooled_dim:
            raise UserError(
                f"config.encoder.{name}.{kind} is {CHECKPOINT!r}, but that tower has no embedding "
                f"of its own; expected one of {', '.join(POOLINGS)}"
            )
    if settings.pooling == CHECKPOINT:
        return tower.pooled_dim
    return count * tower.width * (2 if settings.pooling == FIRST_AND_MEAN else 1)


def text_positions(
    encoder: ml_collections.ConfigDict, architecture: Mapping[str, Any] | None
) -> int:
    """Returns the most tokens that the text tower of `config.encoder` has positions for.

    `architecture` is that of `read_architectures`, None if it is not pretrained. Raises UserError
    if it has no text tower.
    """
    return _tower(encoder, "text", architecture, vocab_size=1).max_tokens


def pretrained_params(
    encoder: ml_collections.ConfigDict, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a model's params with those of its pretrained towers, read from their sources.

    What is not pretrained (a projection, a tower from random weights) stays.
    """
    params = dict(params)
    for name in TOWERS:
        source = encoder[name].pretrained
        if not source:
            continue
        size = encoder.image.image_size if name == "image" else None
        module, loaded = load_pretrained(
            source,
            image_size=size,
            scan_layers=encoder.scan_layers,
            frozen_layers=parse_frozen_layers(encoder[name].frozen_layers),
        )
        params[name] = loaded[name] if isinstance(module, DualEncoder) else loaded
    return params


def _tower(encoder, name, architecture, vocab_size) -> Tower:
    """Returns a tower by its settings, and its architecture if it is pretrained."""
    settings = encoder[name]
    if architecture is None:
        tower = _new_tower(name, settings, vocab_size)
    else:
        tower = _pretrained_tower(name, settings, architecture)
    frozen_layers = parse_frozen_layers(settings.frozen_layers)
    if isinstance(frozen_layers, int) and frozen_layers > tower.layers:
        raise UserError(
            f"config.encoder.{name}.frozen_layers is {settings.frozen_layers!r}; expected at most "
            f"{tower.layers}, the layers of that tower, or {ALL!r}"
        )
    return tower.clone(
        dropout=settings.dropout,
        dtype=jnp.dtype(encoder.compute_dtype),
        attention=encoder.attention,
        scan_layers=encoder.scan_layers,
        remat=encoder.remat,
        frozen_layers=frozen_layers,
        lora_rank=settings.lora_rank,
        pooled_layers=settings.pooled_layers,
    )


def _new_tower(name, settings, vocab_size) -> Tower:
    if settings.width % settings.heads:
        raise UserError(
            f"config.encoder.{name}.width is {settings.width}, "
            f"which {settings.heads} heads do not divide"
        )
    sizes = {
        "width": settings.width,
        "layers": settings.layers,
        "heads": settings.heads,
        "mlp_width": settings.mlp_width,
    }
    if name == "text":
        return Bert(vocab_size=vocab_size, max_length=settings.max_length, **sizes)
    if settings.image_size % settings.patch_size:
        raise UserError(
            f"config.encoder.image.image_size is {settings.image_size}, "
            f"not a multiple of patch_size {settings.patch_size}"
        )
    return VisionTransformer(
        image_size=settings.image_size, patch_size=settings.patch_size, **sizes
    )


def _pretrained_tower(name, settings, architecture) -> Tower:
    where = f"config.encoder.{name}.pretrained={settings.pretrained}"
    module = build_from_architecture(architecture, where)
    if isinstance(module, DualEncoder):
        module = getattr(module, name)
    kind = VisionTower if name == "image" else TextTower
    if not isinstance(module, kind):
        raise UserError(
            f"{where} is of type {architecture['model_type']}, which has no {name} encoder"
        )
    if name == "text":
        return module
    if settings.image_size % module.patch_size and settings.image_size != module.image_size:
        raise UserError(
            f"config.encoder.image.image_size is {settings.image_size}, not a multiple of the "
            f"patch size of {settings.pretrained}, {module.patch_size}"
        )
    return module.clone(image_size=settings.image_size)

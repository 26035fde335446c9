"""What a config leaves open, filled in from its pretrained towers."""

from __future__ import annotations

import copy
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from fne_jax.configuration.rules import validate
from fne_jax.data.captions import AUTHORS, LOWER, NONE, TRAIN
from fne_jax.encoders import towers
from fne_jax.encoders.architectures import (
    LOWER_CASE,
    SENTENCE_MODULES,
    build_from_architecture,
    read_architecture,
)
from fne_jax.encoders.dual_encoder import CHECKPOINT, DualEncoder
from fne_jax.errors import UserError
from fne_jax.objectives.negative_sampling import suspicion_threshold
from fne_jax.objectives.registry import check_learned

# The tokens of a caption, where neither config nor checkpoint says, and its words, where it is
# cleaned as the authors do (the paper).
_TEXT_LENGTH = 30
_MAX_WORDS = 30
# Of objectives without a pretrained pair: MoCo's and ALBEF's temperature, and SigLIP's first bias.
_TEMPERATURE, _BIAS = 0.07, -10.0
# The types that end in an embedding of their own, which is taken, of captions with all the tokens
# that there are positions for, as in their pretraining.
_PAIRS = ("clip", "siglip")
# The mean and the standard deviation of each channel, with pixels in [0, 1], by the type of the
# image tower. ViT was pretrained with 0.5; the authors fine-tune it with CLIP's values.
_CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PIXELS = {
    "siglip": ((0.5,) * 3, (0.5,) * 3),
    "dinov2": _IMAGENET_PIXELS,
    "dinov2_with_registers": _IMAGENET_PIXELS,
    "dinov3_vit": _IMAGENET_PIXELS,
}
# What a config leaves to a published pair, whatever its own encoders had it say.
_OF_PAIR = {
    **{f"encoder.{tower}.{field}": value
       for tower in towers.TOWERS
       for field, value in (("pooling", "auto"), ("pooled_layers", 1), ("frozen_layers", "none"),
                            ("lora_rank", 0))},
    "encoder.text.training_pooling": "auto",
    "encoder.projection_dim": 0,
    "encoder.projection_hidden": 0,
    "image_mean": "()",
    "image_std": "()",
    "data.tokenizer": "auto",
    "data.cleaning": "auto",
    "data.max_words": 0,
    "data.prompt": "auto",
    "data.text_length": 0,
    "evaluation.text_length": 0,
}  # fmt: skip


def overrides_of_pair(path_or_hub_name: str) -> list[str]:
    """Returns `--config.x=y` by which any config describes a published CLIP or SigLIP as it comes.

    Raises UserError if there is no such model, or it is of another type.
    """
    architecture = read_architecture(path_or_hub_name)
    pair = build_from_architecture(architecture, path_or_hub_name)
    if not isinstance(pair, DualEncoder):
        raise UserError(
            f"{path_or_hub_name} is of type {architecture['model_type']}; expected one of "
            f"{', '.join(_PAIRS)}, which encode both images and texts. Of other models evaluate "
            "the --embeddings"
        )
    fields = _OF_PAIR | {"encoder.image.image_size": pair.image.image_size}
    fields |= {f"encoder.{tower}.pretrained": path_or_hub_name for tower in towers.TOWERS}
    return [f"--config.{name}={value}" for name, value in fields.items()]


def resolve(
    config: ml_collections.ConfigDict, workdir: pathlib.Path | None = None
) -> tuple[ml_collections.ConfigDict, dict[str, dict[str, Any]]]:
    """Returns a config with nothing left open, and its pretrained towers' architectures.

    Every command does this once, before it reads data or writes anything. A config that is resolved
    already stays the same. A run's own copies of the architectures, in its workdir, come first.
    Raises UserError if a value cannot be, or a pretrained source is missing, or is no model of that
    kind.
    """
    validate(config)
    architectures = towers.read_architectures(config.encoder, workdir)
    return with_model_defaults(config, architectures), architectures


def with_model_defaults(
    config: ml_collections.ConfigDict, architectures: Mapping[str, Mapping[str, Any]]
) -> ml_collections.ConfigDict:
    """Returns a config whose fields left open ("auto", 0, (), None) are filled in.

    Of its towers' models, by what `encoders.towers.read_architectures` returned, come the poolings,
    the mean and deviation of the pixels, the tokenizer, the cleaning, the prompt and the length of
    captions, and the temperature and the bias of the objective; of the prior the posterior that is
    suspect. Raises UserError if a pretrained source is no model of that kind, or captions are
    longer than it takes.
    """
    config = copy.deepcopy(config)
    types = {tower: architectures.get(tower, {}).get("model_type") for tower in towers.TOWERS}
    for tower, model_type in types.items():
        if config.encoder[tower].pooling == "auto":
            pooling = CHECKPOINT if model_type in _PAIRS else "mean"
            modules = architectures.get(tower, {}).get(SENTENCE_MODULES)
            if modules:
                pooling = CHECKPOINT if modules["dense"] else modules["pooling"]
            config.encoder[tower].pooling = pooling
    if config.encoder.text.training_pooling == "auto":
        config.encoder.text.training_pooling = config.encoder.text.pooling
    mean, std = _PIXELS.get(types["image"], _CLIP_PIXELS)
    config.image_mean = config.image_mean or mean
    config.image_std = config.image_std or std
    modules = architectures.get("text", {}).get(SENTENCE_MODULES, {})
    most = towers.text_positions(config.encoder, architectures.get("text"))
    most = min(most, modules.get("max_seq_length") or most)
    if not config.data.text_length:
        config.data.text_length = most if types["text"] in _PAIRS else min(_TEXT_LENGTH, most)
    if not config.evaluation.text_length:
        config.evaluation.text_length = config.data.text_length
    for part in ("data", "evaluation"):
        if config[part].text_length > most:
            raise UserError(
                f"config.{part}.text_length is {config[part].text_length}, more than the {most} "
                "tokens that the text encoder takes"
            )
    if config.data.prompt == "auto":
        config.data.prompt = modules.get("prompt", "")
    source = config.encoder.text.pretrained
    if config.data.tokenizer == "auto":
        config.data.tokenizer = source or TRAIN
    if config.data.tokenizer == TRAIN and source:
        raise UserError(
            f"config.data.tokenizer is {TRAIN!r}, whose ids mean nothing to the pretrained "
            f"config.encoder.text.pretrained={source}; leave it {'auto'!r}, for that model's own"
        )
    if config.data.cleaning == "auto":
        config.data.cleaning = _cleaning(types["text"], architectures.get("text", {}))
    if config.data.cleaning == AUTHORS:
        config.data.max_words = config.data.max_words or _MAX_WORDS
    learned = _scalars_of_pair(config, architectures)
    if not config.objective.temperature:
        scale = learned.get("logit_scale")
        config.objective.temperature = _TEMPERATURE if scale is None else math.exp(-scale)
    if config.objective.bias is None:
        config.objective.bias = learned.get("logit_bias", _BIAS)
    check_learned(config.objective)
    if config.fne.posterior_threshold is None:
        config.fne.posterior_threshold = suspicion_threshold(config.fne.prior)
    return config


def _cleaning(model_type, architecture):
    """Returns how the captions of a text tower are cleaned, as it was trained."""
    modules = architecture.get(SENTENCE_MODULES, {})
    # As these types' tokenizers have it where their settings do not say.
    uncased = architecture.get(LOWER_CASE, model_type in (None, "bert", "distilbert", "mpnet"))
    if not uncased and not modules.get(LOWER_CASE):
        return NONE
    return LOWER if model_type in _PAIRS or modules else AUTHORS


def _scalars_of_pair(config, architectures):
    """Returns what a pair learned beside the two towers, if a run begins with its embeddings."""
    encoder = config.encoder
    same = encoder.image.pretrained == encoder.text.pretrained
    poolings = {encoder.image.pooling, encoder.text.pooling}
    if not same or poolings != {CHECKPOINT} or encoder.projection_dim:
        return {}
    learned = architectures.get("image", {}).get("scalars", {})
    # A scale without the bias that the loss would need beside it.
    if config.objective.name == "sigmoid" and "logit_bias" not in learned:
        return {}
    return learned

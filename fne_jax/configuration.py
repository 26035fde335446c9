"""Configs: loaded with overrides, checked and resolved; stored beside a run, compared on resume."""

from __future__ import annotations

import copy
import json
import math
import pathlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from fne_jax.config_rules import (
    ADDED_FIELDS,
    BEFORE_REMOVAL,
    REMOVED_FIELDS,
    RENAMED_FIELDS,
    RENAMED_VALUES,
    check_field,
    flatten,
    validate,
)
from fne_jax.encoders import towers
from fne_jax.encoders.architectures import SENTENCE_MODULES
from fne_jax.encoders.dual_encoder import CHECKPOINT
from fne_jax.errors import UserError
from fne_jax.files import write_atomically
from fne_jax.objectives.registry import check_learned

FILE_NAME = "config.json"
_CONFIG_MODULE = "config_config"  # the name under which ml_collections runs config files

# Fields that may change when a run resumes: none alters what the run computes, but for rounding
# and, with micro-batches, which units dropout drops.
MAY_CHANGE = (
    "checkpoint.",
    "compile_cache",
    "data.cache_dir",
    "data.dir",
    "data.max_skipped",
    "data.prefetch",
    "encoder.attention",
    "encoder.remat",
    "evaluation.batch_size",
    "logging.",
    "max_bad_steps",
    "mesh.",
    "micro_batches",
)


def load_config(path: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Returns the config of a file with `--config.x=y` overrides, locked and checked.

    Args:
      path: a Python file with a `get_config` function.
      overrides: command-line arguments, all of the form `--config.x=y`.

    Raises:
      UserError: if the file cannot be loaded, a field is unknown (with the nearest names), or a
        value does not fit.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={path}: there is no such file; try configs/shapes.py")
    fields = flatten(_parse(path, []))
    for override in overrides:
        name, _, _ = override.removeprefix("--").removeprefix("no").partition("=")
        if not override.startswith("--") or not name.startswith("config."):
            raise UserError(f"unknown argument {override!r}; overrides look like --config.x=y")
        check_field(name.removeprefix("config."), fields)
    config = _parse(path, overrides)
    validate(config)
    return config


def _parse(path, overrides):
    # So that a config file can import its neighbours (`from configs import base`) from anywhere.
    top = str(pathlib.Path(path).resolve().parent.parent)
    if top not in sys.path:
        sys.path.append(top)
    sys.modules.pop(_CONFIG_MODULE, None)  # else what the file before defined stays defined
    values = flags.FlagValues()
    arguments = ["fne_jax", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=arguments
    )
    try:
        values(arguments)
        config = values.config
    except flags.Error as error:
        raise UserError(str(error)) from error
    except Exception as error:  # whatever a file of the user's raises
        raise UserError(f"{path}{_line_in(path, error)}: {_in_one_line(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() returns {type(config).__name__}, not a ConfigDict")
    return config


def _line_in(path, error):
    """Returns `, line 7` where an error came from a line of the config file."""
    own = pathlib.Path(path).resolve()
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if pathlib.Path(frame.filename).resolve() == own
    ]
    return f", line {lines[-1]}" if lines else ""


def _in_one_line(error):
    text = " ".join(str(error).split())
    if "get_config" in text:
        return "there is no function get_config() that returns the config"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# The tokens of a caption, where neither config nor checkpoint says (the paper).
_TEXT_LENGTH = 30
# Of objectives without a pretrained pair: MoCo's and ALBEF's temperature, and SigLIP's first bias.
_TEMPERATURE, _BIAS = 0.07, -10.0
_OPENAI_PIXELS = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class _ModelDefaults(NamedTuple):
    """What a config leaves to the type of its pretrained towers.

    Attributes:
      pooling: The pooling of either tower.
      pixels: The mean and the standard deviation of each channel, with pixels in [0, 1].
      full_length: Whether captions have all the tokens that the text tower has positions for, as
        in its pretraining, rather than the paper's 30.
    """

    pooling: str
    pixels: tuple[tuple[float, ...], tuple[float, ...]]
    full_length: bool


# For ViT, BERT and towers from random weights. ViT was pretrained with mean and deviation 0.5; the
# authors fine-tune it with CLIP's values.
_PAPER = _ModelDefaults("mean", _OPENAI_PIXELS, False)
_DINO = _ModelDefaults("mean", _IMAGENET_PIXELS, False)
_DEFAULTS = {
    "clip": _ModelDefaults(CHECKPOINT, _OPENAI_PIXELS, True),
    "siglip": _ModelDefaults(CHECKPOINT, ((0.5,) * 3, (0.5,) * 3), True),
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "dinov3_vit": _DINO,
}


def resolve(
    config: ml_collections.ConfigDict, workdir: pathlib.Path | None = None
) -> tuple[ml_collections.ConfigDict, dict[str, dict[str, Any]]]:
    """Returns a config with nothing left open, and its pretrained towers' architectures.

    Every command does this once, before it reads data or writes anything.

    Args:
      config: As loaded, or resolved already, which changes nothing.
      workdir: The folder of the run, whose own copies of the architectures come first.

    Raises:
      UserError: If a value cannot be, or a pretrained source is not there, or is no model of that
        kind.
    """
    validate(config)
    architectures = towers.read_architectures(config.encoder, workdir)
    return with_model_defaults(config, architectures), architectures


def with_model_defaults(
    config: ml_collections.ConfigDict, architectures: Mapping[str, Mapping[str, Any]]
) -> ml_collections.ConfigDict:
    """Returns a config whose fields left open ("auto", 0, ()) are those of its towers' models.

    These are the poolings, the mean and deviation of the pixels, the tokenizer, the prompt and the
    length of captions, and the temperature and the bias of the objective.

    Args:
      config: As loaded; see configs/base.py.
      architectures: What `encoders.towers.read_architectures` returned.

    Raises:
      UserError: if a pretrained source is no model of that kind, or what it says does not fit.
    """
    config = copy.deepcopy(config)
    defaults = {}
    for tower in towers.TOWERS:
        model_type = architectures.get(tower, {}).get("model_type")
        defaults[tower] = _DEFAULTS.get(model_type, _PAPER)
        if config.encoder[tower].pooling == "auto":
            config.encoder[tower].pooling = defaults[tower].pooling
            modules = architectures.get(tower, {}).get(SENTENCE_MODULES)
            if modules:
                own = CHECKPOINT if modules["dense"] else modules["pooling"]
                config.encoder[tower].pooling = own
    if config.encoder.text.training_pooling == "auto":
        config.encoder.text.training_pooling = config.encoder.text.pooling
    if not config.image_mean:
        config.image_mean = defaults["image"].pixels[0]
    if not config.image_std:
        config.image_std = defaults["image"].pixels[1]
    modules = architectures.get("text", {}).get(SENTENCE_MODULES, {})
    if not config.data.text_length:
        config.data.text_length = min(_TEXT_LENGTH, modules.get("max_seq_length") or _TEXT_LENGTH)
        if defaults["text"].full_length:
            config.data.text_length = towers.text_positions(config.encoder, architectures["text"])
    if not config.evaluation.text_length:
        config.evaluation.text_length = config.data.text_length
    _check_text_lengths(config, modules.get("max_seq_length"))
    if config.data.prompt == "auto":
        config.data.prompt = modules.get("prompt", "")
    if config.data.tokenizer == "auto":
        config.data.tokenizer = config.encoder.text.pretrained or "train"
    learned = _scalars_of_pair(config, architectures)
    if not config.objective.temperature:
        scale = learned.get("logit_scale")
        config.objective.temperature = _TEMPERATURE if scale is None else math.exp(-scale)
    if config.objective.bias is None:
        config.objective.bias = learned.get("logit_bias", _BIAS)
    check_learned(config.objective)
    return config


def _check_text_lengths(config, most):
    for part in ("data", "evaluation") if most else ():
        if config[part].text_length > most:
            raise UserError(
                f"config.{part}.text_length is {config[part].text_length}, more than the {most} "
                f"tokens that {config.encoder.text.pretrained} takes (its max_seq_length)"
            )


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


def store_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json, or checks the one that is there.

    Raises:
      UserError: Listing the fields that differ from the stored run's and may not.
    """
    if (workdir / FILE_NAME).exists():
        check_stored(config, workdir)
    else:
        write_config(config, workdir)


def check_stored(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Checks that the run in a folder has a config, but for fields that may change.

    Raises:
      UserError: Listing the fields that differ, or that there is no config.
    """
    old, new = flatten(read_config(workdir)), flatten(_through_json(config))
    different = [
        f"config.{name}: {old.get(name)!r} in the run, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(MAY_CHANGE)
    ]
    if different:
        raise UserError(
            f"{workdir} holds a run of another config:\n  "
            + "\n  ".join(different)
            + "\nGive the run's own values to resume it, or another --workdir to start anew "
            f"(--config.init_from={workdir} starts from its weights)."
        )


def write_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json, over one that may be there.

    Raises:
      OSError: If it cannot be written.
    """
    write_atomically(workdir / FILE_NAME, json.dumps(json.loads(config.to_json()), indent=2) + "\n")


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config stored with a run.

    Raises:
      UserError: If there is none, it is damaged, or it asks for what was removed.
    """
    path = workdir / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} is not there: {workdir} is not the workdir of a run")
    try:
        config = ml_collections.ConfigDict(_with_new_names(json.loads(path.read_text())))
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file: {error}") from error
    _drop_removed_fields(config, path)
    _add_later_fields(config)
    return config.lock()


def _drop_removed_fields(config, path):
    """Drops the removed fields of a stored config, or raises UserError if they matter."""
    stored = flatten(config)
    for name, (kept, reason) in REMOVED_FIELDS.items():
        if name not in stored:
            continue
        if stored[name] != kept:
            raise UserError(
                f"{path}: config.{name} is {stored[name]!r}, but the field was removed: {reason}. "
                f"Commit {BEFORE_REMOVAL} still reads this run"
            )
        group, _, leaf = name.rpartition(".")
        del (config[group] if group else config)[leaf]


def _add_later_fields(config):
    """Gives a stored config the fields that there were not yet, with what they say of old runs."""
    stored = flatten(config)
    for name, value in ADDED_FIELDS.items():
        group, _, leaf = name.rpartition(".")
        if name not in stored and any(other.startswith(f"{group}.") for other in stored):
            config[group][leaf] = value


def _with_new_names(stored):
    """Returns a stored config's nested fields and values under the names that they have by now."""
    for old, new in RENAMED_FIELDS.items():
        (group, old_leaf), new_leaf = old.split("."), new.rpartition(".")[2]
        if old_leaf in stored.get(group, {}):
            stored[group][new_leaf] = stored[group].pop(old_leaf)
    for name, new_values in RENAMED_VALUES.items():
        group, leaf = name.split(".")
        value = stored.get(group, {}).get(leaf)
        if isinstance(value, bool):
            stored[group][leaf] = new_values[value]
    return stored


def _through_json(config):
    return ml_collections.ConfigDict(json.loads(config.to_json()))

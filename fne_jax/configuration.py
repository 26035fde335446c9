"""Configs: loaded with overrides, checked and resolved; stored beside a run, compared on resume."""

from __future__ import annotations

import copy
import difflib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from fne_jax.data.images.augmentation import AUGMENTATIONS
from fne_jax.data.sources.registry import find_source
from fne_jax.encoders import towers
from fne_jax.encoders.dual_encoder import CHECKPOINT, LONGEST_POOLING
from fne_jax.errors import UserError
from fne_jax.files import write_atomically
from fne_jax.objectives import registry
from fne_jax.objectives.key_blocks import BLOCK

FILE_NAME = "config.json"

# Fields that have another name by now, and which; an old run's config.json is read under the new.
RENAMED_FIELDS = {
    "fne.decay": "fne.tau",
    "fne.statistics_keep": "fne.ema_decay",
    "objective.memory": "objective.queue",
}

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

# Fields that are gone: the value that a stored config may still have, and why they went.
REMOVED_FIELDS = {"data.augment_on": ("host", "images are augmented on the host")}
# The last commit that reads other values of them.
_BEFORE_REMOVAL = "67ae0d0"


def load_config(
    path: str, overrides: Sequence[str], *, on_devices: bool = True
) -> ml_collections.ConfigDict:
    """Returns the config of a file with `--config.x=y` overrides, locked and checked.

    Args:
      path: a Python file with a `get_config` function.
      overrides: command-line arguments, all of the form `--config.x=y`.
      on_devices: Whether batches must fit this machine's accelerators too, which starts them.

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
        _check_field(name.removeprefix("config."), fields)
    config = _parse(path, overrides)
    validate(config, on_devices=on_devices)
    return config


def _parse(path, overrides):
    # So that a config file can import its neighbours (`from configs import base`) from anywhere.
    top = str(pathlib.Path(path).resolve().parent.parent)
    if top not in sys.path:
        sys.path.append(top)
    values = flags.FlagValues()
    arguments = ["fne_jax", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=arguments
    )
    try:
        values(arguments)
        return values.config
    except flags.Error as error:
        raise UserError(str(error)) from error
    except (TypeError, ValueError, ImportError, SyntaxError) as error:
        raise UserError(f"{path}: {error}") from error


def _check_field(name, fields):
    if name in fields:
        return
    if name in REMOVED_FIELDS:
        raise UserError(f"config.{name} was removed: {REMOVED_FIELDS[name][1]}")
    if name in RENAMED_FIELDS:
        raise UserError(f"config.{name} is now config.{RENAMED_FIELDS[name]}")
    if any(field.startswith(name + ".") for field in fields):
        raise UserError(f"config.{name} is a group of fields; set one of its fields")
    near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
    leaf = name.rpartition(".")[2]
    near += [f for f in fields if f.rpartition(".")[2] == leaf and f not in near]
    hint = f"; did you mean {' or '.join(f'config.{n}' for n in near)}?" if near else ""
    raise UserError(f"there is no config field config.{name}{hint}")


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, object]:
    """Returns the leaves of a config under their dotted names."""
    leaves = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def validate(config: ml_collections.ConfigDict, *, on_devices: bool = True) -> None:
    """Raises UserError, naming the field, if a number or a name cannot be.

    Args:
      config: The config.
      on_devices: Whether batches must fit this machine's accelerators too, which starts them.
    """
    fields = flatten(config)
    registry.check(config)
    positive = (
        "num_epochs",
        "global_batch_size",
        "micro_batches",
        "queue_size",
        "data.vocab_size",
        "data.max_words",
        "optimizer.learning_rate",
        "optimizer.clip_norm",
        "warmup.temperature",
        "objective.temperature",
        "evaluation.per_epoch",
        "evaluation.batch_size",
        "checkpoint.keep_latest",
        "logging.every_steps",
        "max_bad_steps",
    )
    for name in positive:
        if not fields[name] > 0:
            raise UserError(f"config.{name} is {fields[name]}; expected a number above 0")
    for name in (
        "fne.margin",
        "fne.tau",
        "fne.min_count",
        "fne.start_epoch",
        "seed",
        "data.text_length",
        "data.resize_to",
        "data.max_skipped",
        "evaluation.captions_per_image",
    ):
        if not fields[name] >= 0:
            raise UserError(f"config.{name} is {fields[name]}; expected a number of at least 0")
    if not 0 < config.fne.prior < 1:
        raise UserError(f"config.fne.prior is {config.fne.prior}; expected a number in (0, 1)")
    if not 0 < config.fne.ema_decay <= 1:
        raise UserError(
            f"config.fne.ema_decay is {config.fne.ema_decay}; expected a number in (0, 1]"
        )
    if config.fne.key_chunk < 0 or config.fne.key_chunk % BLOCK:
        raise UserError(
            f"config.fne.key_chunk is {config.fne.key_chunk}; expected 0 or a multiple of {BLOCK}"
        )
    if not 0 <= config.momentum < 1:
        raise UserError(f"config.momentum is {config.momentum}; expected a number in [0, 1)")
    find_source(config.data.source)
    augmentations = ("none", *AUGMENTATIONS)
    if config.data.augmentation not in augmentations:
        raise UserError(
            f"config.data.augmentation is {config.data.augmentation!r}; expected one of "
            f"{', '.join(augmentations)}"
        )
    if config.queue_size < config.global_batch_size:
        raise UserError(
            f"config.queue_size is {config.queue_size}, smaller than a batch "
            f"(config.global_batch_size is {config.global_batch_size}); make it at least as large"
        )
    for name in ("mesh.data", "mesh.fsdp"):
        if fields[name] < 1 and fields[name] != -1:
            raise UserError(f"config.{name} is {fields[name]}; expected a number above 0, or -1")
    poolings = (config.encoder.text.pooling, config.encoder.text.training_pooling)
    if config.micro_batches > 1 and LONGEST_POOLING in poolings:
        raise UserError(
            f"config.micro_batches is {config.micro_batches}, but config.encoder.text's pooling, "
            f"{LONGEST_POOLING}, looks at the whole batch; make micro_batches 1 or take another"
        )
    if on_devices:
        check_batches(config, jax.device_count())
    from_sizes = not config.encoder.text.pretrained
    if from_sizes and config.data.text_length > config.encoder.text.max_length:
        raise UserError(
            f"config.data.text_length is {config.data.text_length}, more than "
            f"config.encoder.text.max_length, {config.encoder.text.max_length}"
        )


def check_batches(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises UserError, naming the field, unless batches can be split over so many devices."""
    parts = {"global_batch_size": config.micro_batches, "evaluation.batch_size": 1}
    for name, count in parts.items():
        size = flatten(config)[name]
        if size % (devices * count):
            micro = f" in config.micro_batches={count} parts" if count > 1 else ""
            raise UserError(
                f"config.{name} is {size}, which the {devices} devices do not divide{micro}; "
                f"take a multiple of {devices * count}"
            )


# The tokens of a caption, where neither config nor checkpoint says (the paper).
_TEXT_LENGTH = 30
_OPENAI_PIXELS = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


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
_DEFAULTS = {
    "clip": _ModelDefaults(CHECKPOINT, _OPENAI_PIXELS, True),
    "siglip": _ModelDefaults(CHECKPOINT, ((0.5,) * 3, (0.5,) * 3), True),
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
      UserError: if a pretrained source is not there, or is no model of that kind.
    """
    architectures = towers.read_architectures(config.encoder, workdir)
    return with_model_defaults(config, architectures), architectures


def with_model_defaults(
    config: ml_collections.ConfigDict, architectures: Mapping[str, Mapping[str, Any]]
) -> ml_collections.ConfigDict:
    """Returns a config whose fields left open ("auto", 0, ()) are those of its towers' models.

    These are the poolings, the mean and deviation of the pixels, the tokenizer and the length of
    captions.

    Args:
      config: As loaded; see configs/base.py.
      architectures: What `encoders.towers.read_architectures` returned.

    Raises:
      UserError: if a pretrained source is no model of that kind.
    """
    config = copy.deepcopy(config)
    defaults = {}
    for tower in towers.TOWERS:
        model_type = architectures.get(tower, {}).get("model_type")
        defaults[tower] = _DEFAULTS.get(model_type, _PAPER)
        if config.encoder[tower].pooling == "auto":
            config.encoder[tower].pooling = defaults[tower].pooling
    if config.encoder.text.training_pooling == "auto":
        config.encoder.text.training_pooling = config.encoder.text.pooling
    if not config.image_mean:
        config.image_mean = defaults["image"].pixels[0]
    if not config.image_std:
        config.image_std = defaults["image"].pixels[1]
    if not config.data.text_length:
        config.data.text_length = _TEXT_LENGTH
        if defaults["text"].full_length:
            config.data.text_length = towers.text_positions(config.encoder, architectures["text"])
    if not config.evaluation.text_length:
        config.evaluation.text_length = config.data.text_length
    if config.data.tokenizer == "auto":
        config.data.tokenizer = config.encoder.text.pretrained or "train"
    return config


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
                f"Commit {_BEFORE_REMOVAL} still reads this run"
            )
        group, _, leaf = name.rpartition(".")
        del (config[group] if group else config)[leaf]


def _with_new_names(stored):
    """Returns a stored config's nested fields under the names that they have by now."""
    for old, new in RENAMED_FIELDS.items():
        (group, old_leaf), new_leaf = old.split("."), new.rpartition(".")[2]
        if old_leaf in stored.get(group, {}):
            stored[group][new_leaf] = stored[group].pop(old_leaf)
    return stored


def _through_json(config):
    return ml_collections.ConfigDict(json.loads(config.to_json()))

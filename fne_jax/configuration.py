"""Configs: loaded with overrides, checked, stored beside a run, compared when it resumes."""

from __future__ import annotations

import difflib
import json
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from fne_jax.data.images.augmentation import AUGMENTATIONS
from fne_jax.encoders.dual_encoder import LONGEST_POOLING
from fne_jax.errors import UserError
from fne_jax.objectives.key_blocks import BLOCK

FILE_NAME = "config.json"

# Fields that may change when a run resumes: none alters what the run computes.
MAY_CHANGE = (
    "checkpoint.",
    "compile_cache",
    "data.cache_dir",
    "data.dir",
    "data.max_skipped",
    "data.prefetch",
    "evaluation.batch_size",
    "logging.",
    "max_bad_steps",
    "mesh.",
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
        _check_field(name.removeprefix("config."), fields)
    config = _parse(path, overrides)
    validate(config)
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


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming the field, if a number or a name cannot be."""
    fields = flatten(config)
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
        "fne.decay",
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
    if not 0 < config.fne.statistics_keep <= 1:
        raise UserError(
            f"config.fne.statistics_keep is {config.fne.statistics_keep}; "
            "expected a number in (0, 1]"
        )
    if config.fne.key_chunk < 0 or config.fne.key_chunk % BLOCK:
        raise UserError(
            f"config.fne.key_chunk is {config.fne.key_chunk}; expected 0 or a multiple of {BLOCK}"
        )
    if not 0 <= config.momentum < 1:
        raise UserError(f"config.momentum is {config.momentum}; expected a number in [0, 1)")
    choices = {
        "data.augmentation": ("none", *AUGMENTATIONS),
        "data.augment_on": ("host", "device"),
    }
    for name, values in choices.items():
        if fields[name] not in values:
            raise UserError(
                f"config.{name} is {fields[name]!r}; expected one of {', '.join(values)}"
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


def store_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json, or checks the one that is there.

    Raises:
      UserError: listing the fields that differ from the stored run's and may not.
    """
    path = workdir / FILE_NAME
    if path.exists():
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
        return
    scratch = path.with_suffix(".incomplete")
    scratch.write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    os.replace(scratch, path)


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config stored with a run.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    path = workdir / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} is not there: {workdir} is not the workdir of a run")
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text())).lock()
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file: {error}") from error


def _through_json(config):
    return ml_collections.ConfigDict(json.loads(config.to_json()))

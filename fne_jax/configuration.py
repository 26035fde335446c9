"""Configs: loaded with overrides, checked and resolved; stored beside a run, compared on resume."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import pathlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from fne_jax.data.images.augmentation import AUGMENTATIONS
from fne_jax.data.sources.registry import find_source
from fne_jax.encoders import towers
from fne_jax.encoders.attention import ATTENTIONS, AUTO
from fne_jax.encoders.dual_encoder import CHECKPOINT, LONGEST_POOLING, POOLINGS
from fne_jax.errors import UserError
from fne_jax.files import write_atomically
from fne_jax.objectives import registry
from fne_jax.objectives.fne_settings import ELIMINATIONS
from fne_jax.objectives.key_blocks import BLOCK

FILE_NAME = "config.json"
_CONFIG_MODULE = "config_config"  # the name under which ml_collections runs config files

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


@dataclasses.dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, or one of `also`; `whole` and a multiple of `multiple`."""

    low: float
    high: float
    whole: bool = False
    multiple: int = 1
    also: tuple[int, ...] = ()

    def allows(self, value: Any) -> bool:
        """Returns whether a field may have the value."""
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        if value in self.also:
            return True
        return self.low <= value <= self.high and (not self.whole or value % self.multiple == 0)

    def __str__(self):
        kind = "a whole number" if self.whole else "a number"
        kind = f"a multiple of {self.multiple}" if self.multiple > 1 else kind
        also = "".join(f", or {value}" for value in self.also)
        ends = f"from {self.low} to {self.high}" if self.high < _ANY else f"of at least {self.low}"
        return f"{kind} {ends}{also}"


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Several numbers, each as `each`: one of `counts` of them, or any number without counts."""

    each: Number
    counts: tuple[int, ...] = ()

    def allows(self, value: Any) -> bool:
        """Returns whether a field may have the value."""
        if not isinstance(value, list | tuple) or (self.counts and len(value) not in self.counts):
            return False
        return all(self.each.allows(number) for number in value)

    def __str__(self):
        counts = f"{' or '.join(map(str, self.counts))} of them" if self.counts else "any of them"
        return f"a tuple of numbers, {counts}, each {self.each}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several names."""

    names: tuple[str, ...]

    def allows(self, value: Any) -> bool:
        """Returns whether a field may have the value."""
        return value in self.names

    def __str__(self):
        return f"one of {', '.join(self.names)}"


@dataclasses.dataclass(frozen=True)
class Text:
    """A name or a path, or, if it is optional, nothing."""

    optional: bool = True

    def allows(self, value: Any) -> bool:
        """Returns whether a field may have the value."""
        return isinstance(value, str) and "\0" not in value and bool(value or self.optional)

    def __str__(self):
        return "a text" if self.optional else "a text that is not empty"


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or False."""

    def allows(self, value: Any) -> bool:
        """Returns whether a field may have the value."""
        return isinstance(value, bool)

    def __str__(self):
        return "True or False"


_ANY = 10**9  # stands for no upper bound


def _whole(low, high=_ANY, **options):
    return Number(low, high, whole=True, **options)


SCHEDULES = ("step", "cosine")
_POOLINGS = Choice(("auto", *POOLINGS, CHECKPOINT))
_SIZE = _whole(1, 2**16)
_TOWER = {
    "pretrained": Text(),
    "width": _SIZE,
    "layers": _whole(1, 256),
    "heads": _SIZE,
    "mlp_width": _whole(1, 2**20),
    "dropout": Number(0, 0.99),
    "pooling": _POOLINGS,
}
_EPOCHS = Number(0, 10**6)
_SEED = _whole(0, 2**32 - 1)
# [CLS], a piece of a word and [SEP] are the least that a caption has.
_TEXT_LENGTH_RULE = _whole(3, 2**16, also=(0,))

# What each field of a config may be. The optimizer's bounds also keep weights finite (the train
# step looks at losses, gradients and embeddings only): Adam's corrections 1 - b^n stay above 0 in
# float32, and no update of a clipped gradient reaches float32's largest number.
FIELDS = {
    "seed": _SEED,
    "num_epochs": Number(1e-6, 10**6),
    "global_batch_size": _whole(1, 2**24),
    "micro_batches": _whole(1, 2**24),
    "init_from": Text(),
    "max_bad_steps": _whole(1),
    "compile_cache": Text(),
    "mesh.data": _whole(1, 2**24, also=(-1,)),
    "mesh.fsdp": _whole(1, 2**24, also=(-1,)),
    "data.source": Text(optional=False),
    "data.dir": Text(),
    "data.cache_dir": Text(optional=False),
    "data.resize_to": _whole(0, 2**16),
    "data.max_skipped": _whole(0),
    "data.augmentation": Choice(("none", *AUGMENTATIONS)),
    "data.tokenizer": Text(optional=False),
    # Fewer would not spell most words.
    "data.vocab_size": _whole(100, 2**24),
    "data.max_words": _whole(1, 2**16),
    "data.text_length": _TEXT_LENGTH_RULE,
    "data.prefetch": _whole(0, 2**10),
    "data.shapes.seed": _SEED,
    "data.shapes.train_images": _whole(1, 10**8),
    "data.shapes.val_images": _whole(1, 10**8),
    "data.shapes.test_images": _whole(1, 10**8),
    "data.shapes.shapes": _whole(1, 8),
    "data.shapes.colours": _whole(1, 10),
    "data.shapes.max_objects": _whole(1, 3),
    "data.synthetic.seed": _SEED,
    "data.synthetic.images": _whole(1, 10**8),
    "image_mean": Numbers(Number(0, 1), (0, 3)),
    "image_std": Numbers(Number(1e-3, 1), (0, 3)),
    **{f"encoder.image.{name}": rule for name, rule in _TOWER.items()},
    "encoder.image.image_size": _whole(1, 2**14),
    "encoder.image.patch_size": _whole(1, 2**14),
    **{f"encoder.text.{name}": rule for name, rule in _TOWER.items()},
    "encoder.text.max_length": _whole(3, 2**16),
    "encoder.text.training_pooling": _POOLINGS,
    "encoder.projection_dim": _whole(0, 2**16),
    "encoder.compute_dtype": Choice(("float32", "bfloat16")),
    "encoder.attention": Choice((AUTO, *ATTENTIONS)),
    "encoder.scan_layers": Flag(),
    "encoder.remat": Flag(),
    "momentum": Number(0, 0.999999),
    "queue_size": _whole(1, 2**28),
    "objective.name": Choice(tuple(registry.MAIN)),
    "objective.queue": Flag(),
    "objective.temperature": Number(1e-4, 100),
    "objective.bias": Number(-1000, 1000),
    "fne.start_epoch": _EPOCHS,
    "fne.margin": Number(0, 10),
    "fne.tau": Number(0, 10**6),
    "fne.prior": Number(1e-12, 0.9999),
    "fne.posterior_threshold": Number(0, 1),
    "fne.min_count": _whole(0, 2**31 - 1),
    "fne.mask_same_image": Flag(),
    "fne.elimination": Choice(ELIMINATIONS),
    "fne.cut_down": Flag(),
    "fne.monotone": Flag(),
    "fne.ema_decay": Number(1e-6, 1),
    "fne.key_chunk": _whole(0, 2**28, multiple=BLOCK),
    "warmup.objective": Choice(tuple(registry.WARMUP)),
    "warmup.temperature": Number(1e-4, 100),
    "warmup.fill_queue": Flag(),
    "optimizer.learning_rate": Number(1e-20, 1),
    "optimizer.b1": Number(0, 0.9999),
    "optimizer.b2": Number(0, 0.999999),
    "optimizer.eps": Number(1e-20, 1),
    "optimizer.weight_decay": Number(0, 10**6),
    "optimizer.clip_norm": Number(1e-6, 10**6),
    "optimizer.schedule": Choice(SCHEDULES),
    "optimizer.step_epochs": Numbers(_EPOCHS),
    "optimizer.step_factor": Number(0, 1),
    "optimizer.warmup_epochs": _EPOCHS,
    "optimizer.image_factor": Number(0, 1000),
    "optimizer.text_factor": Number(0, 1000),
    "evaluation.per_epoch": _whole(1),
    "evaluation.batch_size": _whole(1, 2**24),
    "evaluation.text_length": _TEXT_LENGTH_RULE,
    "evaluation.captions_per_image": _whole(0),
    "checkpoint.keep_latest": _whole(1),
    "checkpoint.every_steps": _whole(0),
    "logging.every_steps": _whole(1),
    "logging.progress_seconds": Number(0, _ANY),
    "logging.profile_step": _whole(0),
}


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


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming the field, if a value cannot be, or fields do not fit together."""
    fields = flatten(config)
    missing = sorted(FIELDS.keys() - fields.keys())
    if missing:
        raise UserError(
            f"the config lacks {', '.join(f'config.{name}' for name in missing)}; begin a config "
            "with configs/base.py's get_config()"
        )
    for name, value in fields.items():
        _check_field(name, FIELDS)
        rule = FIELDS[name]
        if not rule.allows(value):
            raise UserError(f"config.{name} is {value!r}; expected {rule}")
    find_source(config.data.source)
    _check_together(config)


def _check_together(config):
    """Raises UserError for values that are possible each, but not together."""
    if config.queue_size < config.global_batch_size:
        raise UserError(
            f"config.queue_size is {config.queue_size}, smaller than a batch "
            f"(config.global_batch_size is {config.global_batch_size}); make it at least as large"
        )
    if config.global_batch_size % config.micro_batches:
        raise UserError(
            f"config.global_batch_size is {config.global_batch_size}, which "
            f"config.micro_batches={config.micro_batches} does not divide"
        )
    poolings = (config.encoder.text.pooling, config.encoder.text.training_pooling)
    if config.micro_batches > 1 and LONGEST_POOLING in poolings:
        raise UserError(
            f"config.micro_batches is {config.micro_batches}, but config.encoder.text's pooling, "
            f"{LONGEST_POOLING}, looks at the whole batch; make micro_batches 1 or take another"
        )
    if not config.encoder.text.pretrained:
        for part in ("data", "evaluation"):
            if config[part].text_length > config.encoder.text.max_length:
                raise UserError(
                    f"config.{part}.text_length is {config[part].text_length}, more than "
                    f"config.encoder.text.max_length, {config.encoder.text.max_length}"
                )
    optimizer = config.optimizer
    factor = max(optimizer.image_factor, optimizer.text_factor, 1.0)
    if optimizer.learning_rate * optimizer.weight_decay * factor > 1:
        raise UserError(
            f"config.optimizer.weight_decay is {optimizer.weight_decay}, with which a step at "
            f"learning_rate={optimizer.learning_rate} would take away more than a whole weight"
        )


def check_batches(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises UserError, naming the field, unless batches can be split over so many devices."""
    size, parts = config.global_batch_size, config.micro_batches
    if size % (devices * parts):
        micro = f" in config.micro_batches={parts} parts" if parts > 1 else ""
        raise UserError(
            f"config.global_batch_size is {size}, which the {devices} devices do not divide"
            f"{micro}; take a multiple of {devices * parts}"
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

"""What each field of a config may be, and which fields must fit together."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import ml_collections

from fne_jax.data.captions import CLEANINGS
from fne_jax.data.images.augmentation import AUGMENTATIONS
from fne_jax.data.sources.registry import SOURCES, find_source
from fne_jax.data.sources.shapes_scenes import COLOURS, FACTS, FOUR, MAX_OBJECTS, SHAPES
from fne_jax.encoders.attention import ATTENTIONS, AUTO
from fne_jax.encoders.dual_encoder import CHECKPOINT, LONGEST_POOLING, POOLINGS
from fne_jax.encoders.freezing import NOTHING
from fne_jax.encoders.rematerialization import REMATS
from fne_jax.encoders.transformer import ALL
from fne_jax.errors import UserError
from fne_jax.objectives import registry
from fne_jax.objectives.key_blocks import BLOCK

_ANY = 10**9  # stands for no upper bound


class Rule(NamedTuple):
    """What a field may be: in words, by a function, and as names or the ends of a range."""

    words: str
    allows: Callable[[Any], bool]
    values: tuple = ()


def _number(low, high, *, whole=False, multiple=1, also=()) -> Rule:
    """Returns the rule for a number from `low` to `high`, or one of `also`."""

    def allows(value):
        if value is None:
            return None in also
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return False
        return value in also or (low <= value <= high and (not whole or value % multiple == 0))

    kind = "a whole number" if whole else "a number"
    kind = f"a multiple of {multiple}" if multiple > 1 else kind
    ends = f"from {low} to {high}" if high < _ANY else f"of at least {low}"
    return Rule(f"{kind} {ends}{''.join(f', or {x}' for x in also)}", allows, (low, high))


def _whole(low, high=_ANY, **options) -> Rule:
    return _number(low, high, whole=True, **options)


def _numbers(each: Rule, count: int | None = None) -> Rule:
    """Returns the rule for several numbers: so many or none, or without a count any number."""

    def allows(value):
        if not isinstance(value, list | tuple) or (count and len(value) not in (0, count)):
            return False
        return all(each.allows(number) for number in value)

    how_many = f"0 or {count}" if count else "any"
    return Rule(f"a tuple of numbers, {how_many} of them, each {each.words}", allows)


def _choice(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: value in names, names)


def _is_text(value):
    return isinstance(value, str) and "\0" not in value


_FLAG = Rule("True or False", lambda value: isinstance(value, bool))
_TEXT = Rule("a string", _is_text)
_NAME = Rule("a non-empty string", lambda value: _is_text(value) and value != "")
_OTHER_DATA = Rule(
    '"" or SOURCE:FOLDER, e.g. "coco:/data/coco"',
    lambda value: value == "" or (_is_text(value) and value.partition(":")[0] in SOURCES),
)
_FROZEN_LAYERS = Rule(
    f'"{NOTHING}", "{ALL}", or a number of layers in quotes, e.g. "6"',
    lambda value: isinstance(value, str) and (value in (NOTHING, ALL) or value.isdecimal()),
)
_POOLINGS = _choice("auto", *POOLINGS, CHECKPOINT)
_SIZE = _whole(1, 2**16)
_TOWER = {
    "pretrained": _TEXT,
    "width": _SIZE,
    "layers": _whole(1, 256),
    "heads": _SIZE,
    "mlp_width": _whole(1, 2**20),
    "dropout": _number(0, 0.99),
    "pooling": _POOLINGS,
    "frozen_layers": _FROZEN_LAYERS,
    "lora_rank": _whole(0, 2**12),
    "pooled_layers": _whole(1, 2**8),
}
_EPOCHS = _number(0, 10**6)
_SEED = _whole(0, 2**32 - 1)
# [CLS], a piece of a word and [SEP] are the least that a caption has.
_TEXT_LENGTH_RULE = _whole(3, 2**16, also=(0,))

# What each field of a config may be. The optimizer's bounds also keep weights finite (the train
# step looks at losses, gradients and embeddings only): Adam's corrections 1 - b^n stay above 0 in
# float32, and no update of a clipped gradient reaches float32's largest number.
FIELDS = {
    "seed": _SEED,
    "num_epochs": _number(1e-6, 10**6),
    "global_batch_size": _whole(1, 2**24),
    "micro_batches": _whole(1, 2**24),
    "init_from": _TEXT,
    "max_bad_steps": _whole(1),
    "compile_cache": _TEXT,
    "mesh.data": _whole(1, 2**24, also=(-1,)),
    "mesh.fsdp": _whole(1, 2**24, also=(-1,)),
    "data.source": _NAME,
    "data.dir": _TEXT,
    "data.val": _OTHER_DATA,
    "data.test": _OTHER_DATA,
    "data.image_key": _NAME,
    "data.caption_key": _NAME,
    "data.cache_dir": _NAME,
    "data.resize_to": _whole(0, 2**16),
    "data.max_skipped": _whole(0),
    "data.matches": _TEXT,
    "data.matches_positive": _number(0, 1),
    "data.matches_negative": _number(0, 1),
    "data.refuted": _TEXT,
    "data.augmentation": _choice("none", *AUGMENTATIONS),
    "data.tokenizer": _NAME,
    # Fewer would not spell most words.
    "data.vocab_size": _whole(100, 2**24),
    "data.cleaning": _choice("auto", *CLEANINGS),
    "data.max_words": _whole(0, 2**16),
    "data.prompt": _TEXT,
    "data.text_length": _TEXT_LENGTH_RULE,
    "data.keep_frozen": _FLAG,
    "data.prefetch": _whole(0, 2**10),
    "data.shapes.seed": _SEED,
    "data.shapes.train_images": _whole(1, 10**8),
    "data.shapes.val_images": _whole(1, 10**8),
    "data.shapes.test_images": _whole(1, 10**8),
    "data.shapes.shapes": _whole(1, len(SHAPES)),
    "data.shapes.colours": _whole(1, len(COLOURS)),
    "data.shapes.max_objects": _whole(1, MAX_OBJECTS),
    "data.shapes.facts": _choice(*FACTS),
    "data.synthetic.seed": _SEED,
    "data.synthetic.images": _whole(1, 10**8),
    "image_mean": _numbers(_number(0, 1), 3),
    "image_std": _numbers(_number(1e-3, 1), 3),
    **{f"encoder.image.{name}": rule for name, rule in _TOWER.items()},
    "encoder.image.image_size": _whole(1, 2**14),
    "encoder.image.patch_size": _whole(1, 2**14),
    **{f"encoder.text.{name}": rule for name, rule in _TOWER.items()},
    "encoder.text.max_length": _whole(3, 2**16),
    "encoder.text.training_pooling": _POOLINGS,
    "encoder.projection_dim": _whole(0, 2**16),
    "encoder.projection_hidden": _whole(0, 2**16),
    "encoder.compute_dtype": _choice("float32", "bfloat16"),
    "encoder.attention": _choice(AUTO, *ATTENTIONS),
    "encoder.scan_layers": _FLAG,
    "encoder.remat": _choice(*REMATS),
    "momentum": _number(0, 0.999999),
    "queue_size": _whole(1, 2**28),
    "objective.name": _choice(*registry.OBJECTIVES),
    "objective.queue": _FLAG,
    "objective.temperature": _number(1e-4, 100, also=(0,)),
    "objective.bias": _number(-1000, 1000, also=(None,)),
    "objective.learn_temperature": _FLAG,
    "objective.teacher": _TEXT,
    "objective.teacher_cross_weight": _number(0, 1000),
    "objective.teacher_own_weight": _number(0, 1000),
    "objective.teacher_temperature": _number(1e-4, 100),
    "objective.guide_margin": _number(-2, 2, also=(None,)),
    "objective.oracle": _choice(*registry.ORACLES),
    "fne.start_epoch": _EPOCHS,
    "fne.margin": _number(0, 10),
    "fne.tau": _number(0, 10**6),
    "fne.elimination_tau": _number(0, 10**6, also=(None,)),
    "fne.prior": _number(1e-12, 0.9999),
    "fne.posterior_threshold": _number(0, 1, also=(None,)),
    "fne.min_count": _whole(0, 2**31 - 1),
    "fne.mask_same_image": _FLAG,
    "fne.posterior": _choice(*registry.POSTERIORS),
    "fne.elimination": _choice(*registry.ELIMINATIONS),
    "fne.cut_down": _FLAG,
    "fne.monotone": _FLAG,
    "fne.ema_decay": _number(1e-6, 1),
    "fne.key_chunk": _whole(0, 2**28, multiple=BLOCK),
    "warmup.objective": _choice(*registry.WARMUP),
    "warmup.temperature": _number(1e-4, 100),
    "warmup.fill_queue": _FLAG,
    "optimizer.learning_rate": _number(1e-20, 1),
    "optimizer.b1": _number(0, 0.9999),
    "optimizer.b2": _number(0, 0.999999),
    "optimizer.eps": _number(1e-20, 1),
    "optimizer.weight_decay": _number(0, 10**6),
    "optimizer.clip_norm": _number(1e-6, 10**6),
    "optimizer.schedule": _choice("step", "cosine"),
    "optimizer.step_epochs": _numbers(_EPOCHS),
    "optimizer.step_factor": _number(0, 1),
    "optimizer.warmup_epochs": _EPOCHS,
    "optimizer.image_factor": _number(1e-6, 1000),
    "optimizer.text_factor": _number(1e-6, 1000),
    "optimizer.objective_factor": _number(1e-6, 1000),
    "optimizer.layer_decay": _number(1e-3, 1),
    "evaluation.per_epoch": _whole(1),
    "evaluation.batch_size": _whole(1, 2**24),
    "evaluation.text_length": _TEXT_LENGTH_RULE,
    "evaluation.captions_per_image": _whole(0),
    "checkpoint.keep_latest": _whole(1),
    "checkpoint.every_steps": _whole(0),
    "logging.every_steps": _whole(1),
    "logging.wandb": _FLAG,
    "logging.progress_seconds": _number(0, _ANY),
    "logging.profile_step": _whole(0),
}


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
        check_field(name, FIELDS)
        rule = FIELDS[name]
        if not rule.allows(value):
            raise UserError(f"config.{name} is {value!r}; expected {rule.words}")
    find_source(config.data.source)
    _check_together(config)


def _check_together(config):
    """Raises UserError for values that are possible each, but not together."""
    _check_frozen(config)
    shapes = config.data.shapes
    if shapes.facts == FOUR and shapes.max_objects != MAX_OBJECTS:
        raise UserError(
            f"config.data.shapes.max_objects is {shapes.max_objects}; with facts={FOUR} every "
            f"scene has {MAX_OBJECTS} objects, so make it {MAX_OBJECTS}"
        )
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
    registry.check_matches(config)
    registry.check_learned(config.objective)
    poolings = (config.encoder.text.pooling, config.encoder.text.training_pooling)
    if config.micro_batches > 1 and LONGEST_POOLING in poolings:
        raise UserError(
            f"config.micro_batches is {config.micro_batches}, but config.encoder.text's pooling, "
            f"{LONGEST_POOLING}, looks at the whole batch; make micro_batches 1 or take another"
        )
    optimizer = config.optimizer
    factor = max(optimizer.image_factor, optimizer.text_factor, 1.0)
    if optimizer.learning_rate * optimizer.weight_decay * factor > 1:
        raise UserError(
            f"config.optimizer.weight_decay is {optimizer.weight_decay}, with which a step at "
            f"learning_rate={optimizer.learning_rate} would take away more than a whole weight"
        )


def _check_frozen(config):
    """Raises UserError for layers that are frozen and something else that goes not with them."""
    encoder = config.encoder
    towers = {"image": encoder.image, "text": encoder.text}
    for name, tower in towers.items():
        if tower.frozen_layers == ALL and tower.lora_rank:
            raise UserError(
                f"config.encoder.{name}.lora_rank is {tower.lora_rank}, but frozen_layers is "
                f"{ALL!r}, with which no layer is changed; take a number of layers or {NOTHING!r}"
            )
    frozen = {name: tower.frozen_layers != NOTHING for name, tower in towers.items()}
    whole = all(tower.frozen_layers == ALL for tower in towers.values())
    if whole and not encoder.projection_dim and not config.objective.learn_temperature:
        raise UserError(
            f"config.encoder.image.frozen_layers and text.frozen_layers are {ALL!r}: there is "
            "nothing to train; set config.encoder.projection_dim, or freeze fewer layers"
        )
    if encoder.projection_hidden and not encoder.projection_dim:
        raise UserError(
            f"config.encoder.projection_hidden is {encoder.projection_hidden}, but "
            "config.encoder.projection_dim is 0: there is no projection; set both"
        )
    if not config.data.keep_frozen:
        return
    augmentation = config.data.augmentation
    if not (frozen["text"] or (frozen["image"] and augmentation == "none")):
        raise UserError(
            "config.data.keep_frozen is True, but there is nothing to keep: "
            f"config.encoder.image.frozen_layers is {encoder.image.frozen_layers!r} with "
            f"config.data.augmentation={augmentation}, and config.encoder.text.frozen_layers is "
            f"{encoder.text.frozen_layers!r}. Freeze layers, and take augmentation=none for images"
        )
    pooling, training_pooling = encoder.text.pooling, encoder.text.training_pooling
    if frozen["text"] and training_pooling not in ("auto", pooling):
        raise UserError(
            f"config.encoder.text.training_pooling is {training_pooling!r} and its pooling "
            f"{pooling!r}: with config.data.keep_frozen captions are pooled in one way; make it "
            "auto"
        )
    if frozen["text"] and pooling == LONGEST_POOLING:
        raise UserError(
            f"config.encoder.text.pooling is {pooling!r}, which depends on the other captions of a "
            "batch, so that nothing can be kept; take another, or config.data.keep_frozen=False"
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


def check_field(name: str, fields: Collection[str]) -> None:
    """Raises UserError, with the nearest names, unless a config has a field of this dotted name."""
    if name in fields:
        return
    if any(field.startswith(name + ".") for field in fields):
        raise UserError(f"config.{name} is a group of fields; set one of its fields")
    near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
    leaf = name.rpartition(".")[2]
    near += [f for f in fields if f.rpartition(".")[2] == leaf and f not in near]
    hint = f"; did you mean {' or '.join(f'config.{n}' for n in near)}?" if near else ""
    raise UserError(f"there is no config field config.{name}{hint}")

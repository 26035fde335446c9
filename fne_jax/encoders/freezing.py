"""Which parameters are trained, and which are frozen.

What is frozen has no gradient, no optimizer moments and no momentum copy: it is kept apart from the
parameters that are trained, and put together with them (`merge`) where the encoders run.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict as flatten
from flax.traverse_util import unflatten_dict as unflatten

from fne_jax.encoders.low_rank import FACTORS
from fne_jax.encoders.transformer import ALL, FROZEN_LAYERS, LAYERS, STACK, Tower

TOWERS = ("image", "text")
NOTHING = "none"


class Part(enum.Enum):
    """What a parameter belongs to."""

    # Trained.
    TRAINED = "trained"
    # Frozen, and used before anything that is trained: what it gives is computed once a step.
    LOWER = "lower"
    # Frozen, and used by what is trained: kernels beneath low-rank changes, or what all layers use.
    BASE = "base"


def parse_frozen_layers(value: str) -> int | str | None:
    """Returns the `Tower.frozen_layers` that a config's "none", "all" or number stands for.

    Raises ValueError if it is not one of these.
    """
    if value == NOTHING:
        return None
    return ALL if value == ALL else int(value)


def is_frozen_below(module: nn.Module, tower: str) -> bool:
    """Returns whether a tower begins with a frozen part, whose output is computed once a step.

    `module` is the pair, a `DualEncoder`; nothing of another module is frozen.
    """
    return getattr(getattr(module, tower, None), "frozen_layers", None) is not None


def split(module: nn.Module, params: Mapping[str, Any]) -> dict[Part, dict[str, Any]]:
    """Returns the parameters of a pair of towers, or some of them, by what they belong to.

    They are arrays or their shapes. Of another module than a `DualEncoder` all is trained.
    """
    parts: dict[Part, dict] = {part: {} for part in Part}
    for path, leaf in flatten(params).items():
        tower = getattr(module, path[0], None) if path[0] in TOWERS else None
        part = _part_of(tower, path[1:]) if isinstance(tower, Tower) else Part.TRAINED
        parts[part][path] = leaf
    return {part: unflatten(flat) for part, flat in parts.items()}


def trained_and_frozen(
    module: nn.Module, params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters that are trained, and those that are frozen."""
    parts = split(module, params)
    return parts[Part.TRAINED], merge(parts[Part.LOWER], parts[Part.BASE])


def merge(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of several trees in one; later ones replace those of the same path."""
    flat: dict[tuple[str, ...], Any] = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(flat)


def layer_of(tower: Tower, path: tuple[str, ...]) -> int | slice | None:
    """Returns which layers of a tower a parameter is of; None for one before or after all layers.

    `path` are the names that lead to it within the tower. That is the index of the layer, or for
    stacked parameters the slice of all that they hold.
    """
    if path[0] != STACK:
        return None
    if path[1] == FROZEN_LAYERS:
        return slice(0, tower.frozen_depth)
    if path[1] == LAYERS:
        return slice(tower.frozen_depth, tower.layers)
    return int(path[1].removeprefix("layer_"))


def _part_of(tower, path):
    if tower.frozen_layers == ALL:
        return Part.LOWER
    if tower.frozen_layers is not None and path[0] in tower.in_all_layers:
        return Part.BASE
    if tower.frozen_layers is not None and path[0] not in tower.after_layers:
        layer = layer_of(tower, path)
        first = layer.start if isinstance(layer, slice) else layer
        if first is None or first < tower.frozen_depth:
            return Part.LOWER
    if tower.lora_rank and path[-1] not in FACTORS:
        return Part.BASE
    return Part.TRAINED

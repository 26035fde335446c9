"""What the tables are made of that say what Hugging Face calls a tower's sizes and weights.

Each tower has its table (`Tower.layout`); reading and writing both follow it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Transform(NamedTuple):
    """How a tensor of a checkpoint becomes a parameter of ours, and back."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _product_of(convolution):
    return convolution.transpose(2, 3, 1, 0).reshape(-1, len(convolution))


def _convolution_of(product):
    side = math.isqrt(len(product) // 3)
    return product.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


SAME = Transform(lambda x: x, lambda x: x)
TRANSPOSED = Transform(np.transpose, np.transpose)
CONVOLUTION = Transform(_product_of, _convolution_of)
ONE_AXIS_LESS = Transform(lambda x: x[None], lambda x: x[0])
TWO_AXES_LESS = Transform(lambda x: x[None, None], lambda x: x[0, 0])

# What an entry of the tables below holds: the ends of our paths, of their names, and the transform.
VALUE = (("", "", SAME),)
VECTOR = (("", "", TWO_AXES_LESS),)
TABLE = (("", ".weight", SAME),)
POSITIONS = (("", ".weight", ONE_AXIS_LESS),)
NORM = (("/scale", ".weight", SAME), ("/bias", ".bias", SAME))
DENSE = (("/kernel", ".weight", TRANSPOSED), ("/bias", ".bias", SAME))
PRODUCT = (("/kernel", ".weight", TRANSPOSED),)
PATCHES = (("/kernel", ".weight", CONVOLUTION), ("/bias", ".bias", SAME))
PATCH_KERNEL = (("/kernel", ".weight", CONVOLUTION),)
# A tensor that several entries name holds them one below another.
JOINT = (("/kernel", "_weight", TRANSPOSED), ("/bias", "_bias", SAME))


class Layout(NamedTuple):
    """What Hugging Face calls the parts of one of our towers.

    Attributes:
      fields: For each of our attributes, the field of their config.json.
      fixed: Fields of their config.json for which our tower supports one value only.
      weights: For each parameter its path in ours, its name in theirs, and its transforms.
      layer: The beginning of the names of layer {} in theirs; in ours it is `encoder/layer_{}`.
      layer_weights: The same as `weights`, relative to a layer.
      ratios: Our attributes that their field states as a multiple of the width.
    """

    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    weights: tuple
    layer: str
    layer_weights: tuple
    ratios: tuple[str, ...] = ()


SIZES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "norm_epsilon": "layer_norm_eps",
}
IMAGE_SIZES = {**SIZES, "image_size": "image_size", "patch_size": "patch_size"}
TEXT_SIZES = {**SIZES, "vocab_size": "vocab_size", "max_length": "max_position_embeddings"}

# Entries of files that no encoder needs: heads for other tasks, and buffers.
IGNORED = re.compile(
    r"((pre_)?classifier|pooler|cls|decoder|lm_head|qa_outputs)\."
    r"|vocab_(transform|layer_norm|projector)\."
    r"|(.*\.)?(position_ids|token_type_ids|mask_token|num_batches_tracked)$"
)

"""What Hugging Face's checkpoints call the sizes and weights of our towers: one table for each.

Reading and writing both follow the tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fne_jax.encoders.bert import Bert
from fne_jax.encoders.clip import ClipText, ClipVision
from fne_jax.encoders.siglip import SiglipText, SiglipVision
from fne_jax.encoders.transformer import Tower
from fne_jax.encoders.vision_transformer import VisionTransformer


class Transform(NamedTuple):
    """How a tensor of a checkpoint becomes a parameter of ours, and back."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _product_of(convolution):
    return convolution.transpose(2, 3, 1, 0).reshape(-1, len(convolution))


def _convolution_of(product):
    side = math.isqrt(len(product) // 3)
    return product.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


_SAME = Transform(lambda x: x, lambda x: x)
_TRANSPOSED = Transform(np.transpose, np.transpose)
_CONVOLUTION = Transform(_product_of, _convolution_of)
_ONE_AXIS_LESS = Transform(lambda x: x[None], lambda x: x[0])
_TWO_AXES_LESS = Transform(lambda x: x[None, None], lambda x: x[0, 0])

# What an entry of the tables below holds: the ends of our paths, of their names, and the transform.
VALUE = (("", "", _SAME),)
_VECTOR = (("", "", _TWO_AXES_LESS),)
_TABLE = (("", ".weight", _SAME),)
_POSITIONS = (("", ".weight", _ONE_AXIS_LESS),)
_NORM = (("/scale", ".weight", _SAME), ("/bias", ".bias", _SAME))
_DENSE = (("/kernel", ".weight", _TRANSPOSED), ("/bias", ".bias", _SAME))
_PRODUCT = (("/kernel", ".weight", _TRANSPOSED),)
_PATCHES = (("/kernel", ".weight", _CONVOLUTION), ("/bias", ".bias", _SAME))
_PATCH_KERNEL = (("/kernel", ".weight", _CONVOLUTION),)
# A tensor that several entries name holds them one below another.
_JOINT = (("/kernel", "_weight", _TRANSPOSED), ("/bias", "_bias", _SAME))


class Layout(NamedTuple):
    """What Hugging Face calls the parts of one of our towers.

    Attributes:
      fields: For each of our attributes, the field of their config.json.
      fixed: Fields of their config.json for which our tower supports one value only.
      weights: For each parameter its path in ours, its name in theirs, and its transforms.
      layer: The beginning of the names of layer {} in theirs; in ours it is `encoder/layer_{}`.
      layer_weights: The same as `weights`, relative to a layer.
    """

    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    weights: tuple
    layer: str
    layer_weights: tuple


_SIZES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "norm_epsilon": "layer_norm_eps",
}
_IMAGE_SIZES = {**_SIZES, "image_size": "image_size", "patch_size": "patch_size"}
_TEXT_SIZES = {**_SIZES, "vocab_size": "vocab_size", "max_length": "max_position_embeddings"}

_CLIP_LAYER = (
    ("attention_norm", "layer_norm1", _NORM),
    ("attention/query", "self_attn.q_proj", _DENSE),
    ("attention/key", "self_attn.k_proj", _DENSE),
    ("attention/value", "self_attn.v_proj", _DENSE),
    ("attention/output", "self_attn.out_proj", _DENSE),
    ("mlp_norm", "layer_norm2", _NORM),
    ("mlp_in", "mlp.fc1", _DENSE),
    ("mlp_out", "mlp.fc2", _DENSE),
)

LAYOUTS: dict[type[Tower], Layout] = {
    VisionTransformer: Layout(
        fields=_IMAGE_SIZES,
        fixed={"num_channels": 3, "qkv_bias": True},
        weights=(
            ("class_token", "embeddings.cls_token", VALUE),
            ("position_embedding", "embeddings.position_embeddings", VALUE),
            ("patch_embedding", "embeddings.patch_embeddings.projection", _PATCHES),
            ("final_norm", "layernorm", _NORM),
        ),
        layer="encoder.layer.{}.",
        layer_weights=(
            ("attention_norm", "layernorm_before", _NORM),
            ("attention/query", "attention.attention.query", _DENSE),
            ("attention/key", "attention.attention.key", _DENSE),
            ("attention/value", "attention.attention.value", _DENSE),
            ("attention/output", "attention.output.dense", _DENSE),
            ("mlp_norm", "layernorm_after", _NORM),
            ("mlp_in", "intermediate.dense", _DENSE),
            ("mlp_out", "output.dense", _DENSE),
        ),
    ),
    Bert: Layout(
        fields={**_TEXT_SIZES, "segments": "type_vocab_size"},
        fixed={"position_embedding_type": "absolute", "is_decoder": False},
        weights=(
            ("word_embedding", "embeddings.word_embeddings", _TABLE),
            ("position_embedding", "embeddings.position_embeddings", _TABLE),
            ("segment_embedding", "embeddings.token_type_embeddings", _TABLE),
            ("embedding_norm", "embeddings.LayerNorm", _NORM),
        ),
        layer="encoder.layer.{}.",
        layer_weights=(
            ("attention/query", "attention.self.query", _DENSE),
            ("attention/key", "attention.self.key", _DENSE),
            ("attention/value", "attention.self.value", _DENSE),
            ("attention/output", "attention.output.dense", _DENSE),
            ("attention_norm", "attention.output.LayerNorm", _NORM),
            ("mlp_in", "intermediate.dense", _DENSE),
            ("mlp_out", "output.dense", _DENSE),
            ("mlp_norm", "output.LayerNorm", _NORM),
        ),
    ),
    ClipVision: Layout(
        fields={**_IMAGE_SIZES, "projection_dim": "projection_dim"},
        fixed={"num_channels": 3},
        weights=(
            ("class_token", "vision_model.embeddings.class_embedding", _VECTOR),
            ("position_embedding", "vision_model.embeddings.position_embedding", _POSITIONS),
            ("patch_embedding", "vision_model.embeddings.patch_embedding", _PATCH_KERNEL),
            # Spelt so in their files.
            ("embedding_norm", "vision_model.pre_layrnorm", _NORM),
            ("final_norm", "vision_model.post_layernorm", _NORM),
            ("projection", "visual_projection", _PRODUCT),
        ),
        layer="vision_model.encoder.layers.{}.",
        layer_weights=_CLIP_LAYER,
    ),
    ClipText: Layout(
        fields={
            **_TEXT_SIZES,
            "projection_dim": "projection_dim",
            "eos_token_id": "eos_token_id",
        },
        fixed={},
        weights=(
            ("word_embedding", "text_model.embeddings.token_embedding", _TABLE),
            ("position_embedding", "text_model.embeddings.position_embedding", _TABLE),
            ("final_norm", "text_model.final_layer_norm", _NORM),
            ("projection", "text_projection", _PRODUCT),
        ),
        layer="text_model.encoder.layers.{}.",
        layer_weights=_CLIP_LAYER,
    ),
    SiglipVision: Layout(
        fields=_IMAGE_SIZES,
        fixed={"num_channels": 3, "vision_use_head": True},
        weights=(
            ("position_embedding", "vision_model.embeddings.position_embedding", _POSITIONS),
            ("patch_embedding", "vision_model.embeddings.patch_embedding", _PATCHES),
            ("final_norm", "vision_model.post_layernorm", _NORM),
            ("head/probe", "vision_model.head.probe", VALUE),
            ("head/attention/query", "vision_model.head.attention.in_proj", _JOINT),
            ("head/attention/key", "vision_model.head.attention.in_proj", _JOINT),
            ("head/attention/value", "vision_model.head.attention.in_proj", _JOINT),
            ("head/attention/output", "vision_model.head.attention.out_proj", _DENSE),
            ("head/norm", "vision_model.head.layernorm", _NORM),
            ("head/mlp_in", "vision_model.head.mlp.fc1", _DENSE),
            ("head/mlp_out", "vision_model.head.mlp.fc2", _DENSE),
        ),
        layer="vision_model.encoder.layers.{}.",
        layer_weights=_CLIP_LAYER,
    ),
    SiglipText: Layout(
        fields={**_TEXT_SIZES, "projection_dim": "projection_size"},
        fixed={},
        weights=(
            ("word_embedding", "text_model.embeddings.token_embedding", _TABLE),
            ("position_embedding", "text_model.embeddings.position_embedding", _TABLE),
            ("final_norm", "text_model.final_layer_norm", _NORM),
            ("head", "text_model.head", _DENSE),
        ),
        layer="text_model.encoder.layers.{}.",
        layer_weights=_CLIP_LAYER,
    ),
}


class Model(NamedTuple):
    """A model type of Hugging Face's.

    Attributes:
      architecture: The name of its class in transformers.
      towers: The types of our towers that it consists of.
      scalars: Further parameters, with the values that their authors begin with.
    """

    architecture: str
    towers: tuple[type[Tower], ...]
    scalars: Mapping[str, np.ndarray]


MODELS = {
    "vit": Model("ViTModel", (VisionTransformer,), {}),
    "bert": Model("BertModel", (Bert,), {}),
    "clip": Model(
        "CLIPModel",
        (ClipVision, ClipText),
        {"logit_scale": np.asarray(np.log(1 / 0.07), np.float32)},
    ),
    "siglip": Model(
        "SiglipModel",
        (SiglipVision, SiglipText),
        {
            "logit_scale": np.asarray([np.log(10)], np.float32),
            "logit_bias": np.asarray([-10], np.float32),
        },
    ),
}

# Entries of files that no encoder needs: heads for other tasks, and buffers.
IGNORED = re.compile(
    r"(classifier|pooler|cls|decoder|lm_head|qa_outputs)\."
    r"|(.*\.)?(position_ids|token_type_ids|mask_token|num_batches_tracked)$"
)

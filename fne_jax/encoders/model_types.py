"""The model types of Hugging Face's that are known: one row for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fne_jax.encoders.bert import Bert
from fne_jax.encoders.clip import ClipText, ClipVision
from fne_jax.encoders.dinov2 import Dinov2, Dinov2WithRegisters
from fne_jax.encoders.dinov3 import Dinov3
from fne_jax.encoders.distilbert import DistilBert
from fne_jax.encoders.mpnet import MPNet
from fne_jax.encoders.roberta import Roberta, XlmRoberta
from fne_jax.encoders.siglip import SiglipText, SiglipVision
from fne_jax.encoders.transformer import Tower
from fne_jax.encoders.vision_transformer import VisionTransformer


class Model(NamedTuple):
    """A model type of Hugging Face's.

    Attributes:
      architecture: The name of its class in transformers.
      towers: The types of our towers that it consists of.
      scalars: Further parameters, with the values that their authors begin with.
      prefix: What its weights' names begin with in models for a task; None for the type.
    """

    architecture: str
    towers: tuple[type[Tower], ...]
    scalars: Mapping[str, np.ndarray]
    prefix: str | None = None


MODELS = {
    "vit": Model("ViTModel", (VisionTransformer,), {}),
    "dinov2": Model("Dinov2Model", (Dinov2,), {}),
    "dinov2_with_registers": Model("Dinov2WithRegistersModel", (Dinov2WithRegisters,), {}),
    "dinov3_vit": Model("DINOv3ViTModel", (Dinov3,), {}),
    "bert": Model("BertModel", (Bert,), {}),
    "distilbert": Model("DistilBertModel", (DistilBert,), {}),
    "mpnet": Model("MPNetModel", (MPNet,), {}),
    "roberta": Model("RobertaModel", (Roberta,), {}),
    "xlm-roberta": Model("XLMRobertaModel", (XlmRoberta,), {}, prefix="roberta"),
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

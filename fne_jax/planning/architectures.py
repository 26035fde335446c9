"""Architectures of published encoders, so that planning needs neither the hub nor a download."""

from __future__ import annotations

from typing import Any

import ml_collections

from fne_jax.encoders.hub_files import read_architecture
from fne_jax.encoders.towers import TOWERS

_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
# By hub name, the fields that shape the model, of Dosovitskiy et al. 2021 (arXiv 2010.11929,
# table 1) and Devlin et al. 2019 (arXiv 1810.04805, section 3).
PUBLISHED = {
    "google/vit-base-patch16-384": {
        **_BASE,
        "model_type": "vit",
        "image_size": 384,
        "patch_size": 16,
        "num_channels": 3,
        "qkv_bias": True,
    },
    "bert-base-uncased": {
        **_BASE,
        "model_type": "bert",
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
}


def read_architectures(encoder: ml_collections.ConfigDict) -> dict[str, dict[str, Any]]:
    """Returns the config.json of each pretrained tower: from here if published, else its source's.

    Args:
      encoder: `config.encoder`.

    Raises:
      UserError: if a source of another name is not there.
    """
    names = {tower: encoder[tower].pretrained for tower in TOWERS if encoder[tower].pretrained}
    return {
        tower: PUBLISHED[name] if name in PUBLISHED else read_architecture(name)
        for tower, name in names.items()
    }

"""Published encoders and datasets, so that planning needs neither the hub nor a download."""

from __future__ import annotations

import logging
from typing import Any

import ml_collections

from fne_jax.encoders.architectures import read_architecture
from fne_jax.encoders.towers import TOWERS

_log = logging.getLogger(__name__)

# By hub name, the fields that shape the model and differ from transformers' defaults, which are of
# ViT-B/16, BERT-base and DINOv2-B. From Dosovitskiy et al. 2021 (arXiv 2010.11929, table 1), Oquab
# et al. 2023 (arXiv 2304.07193, table 17), Wang et al. 2020 (arXiv 2002.10957), whose student of
# six layers it is, and Devlin et al. 2019 (arXiv 1810.04805, section 3).
PUBLISHED = {
    "google/vit-base-patch16-384": {"model_type": "vit", "image_size": 384},
    "facebook/dinov2-small": {
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "intermediate_size": 1536,
    },
    "bert-base-uncased": {"model_type": "bert"},
}

# Training pairs of the datasets in Karpathy's splits: captions of 113,287 images of COCO (train
# and restval), and five of each of 29,000 images of Flickr30K.
TRAINING_PAIRS = {"coco": 566_747, "flickr30k": 145_000}


def read_architectures(encoder: ml_collections.ConfigDict) -> dict[str, dict[str, Any]]:
    """Returns the config.json of each pretrained tower: from here if published, else its source's.

    Raises UserError if a source of another name does not exist.
    """
    architectures = {}
    for tower in TOWERS:
        name = encoder[tower].pretrained
        if name in PUBLISHED:
            _log.info("%s: architecture as published, nothing is read", name)
            architectures[tower] = PUBLISHED[name]
        elif name:
            architectures[tower] = read_architecture(name)
    return architectures


def training_pairs(config_name: str) -> int | None:
    """Returns the training pairs of the dataset that a config's file is named after, or None."""
    return next((n for name, n in TRAINING_PAIRS.items() if config_name.startswith(name)), None)

"""Architectures of published encoders, so that planning needs neither the hub nor a download."""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
import tempfile
from collections.abc import Iterator

import ml_collections

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


@contextlib.contextmanager
def without_hub(config: ml_collections.ConfigDict) -> Iterator[ml_collections.ConfigDict]:
    """Gives a config whose towers of published names are read from here, not from the hub.

    Only their architecture is there, no weights. Towers of other names stay as they are.
    """
    config = copy.deepcopy(config)
    with tempfile.TemporaryDirectory() as folder:
        for tower in TOWERS:
            fields = PUBLISHED.get(config.encoder[tower].pretrained)
            if fields is not None:
                place = pathlib.Path(folder, tower)
                place.mkdir()
                (place / "config.json").write_text(json.dumps(fields))
                config.encoder[tower].pretrained = str(place)
        yield config


def published_towers(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the names of the config's towers whose architecture is known here."""
    names = (config.encoder[tower].pretrained for tower in TOWERS)
    return [name for name in names if name in PUBLISHED]

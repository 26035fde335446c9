"""What folders of sentence-transformers state beside their transformer: pooling, dense layers.

Their modules.json names modules that follow one another; each keeps its files in a folder of its
own, the transformer beside modules.json. Reimers and Gurevych 2019, arXiv 1908.10084.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fne_jax.encoders.dual_encoder import POOLINGS
from fne_jax.encoders.hub_files import WEIGHTS, read_json
from fne_jax.encoders.layers import dense
from fne_jax.errors import UserError
from fne_jax.files import as_user_error

MODULES = "modules.json"
_PROMPTS = "config_sentence_transformers.json"
# Older ones are named after the model type.
_TRANSFORMER = "sentence_*_config.json"
# Glob patterns of the files that are read, in which * stands for slashes too.
FILES = [MODULES, _PROMPTS, _TRANSFORMER, "*/config.json"]
DENSE = f"*_Dense/{WEIGHTS}"

_ORDER = re.compile(r"Transformer Pooling( Dense)*( Normalize)?")
# Our poolings by their names.
_POOLINGS = {"cls": "first", "mean": "mean", "max": "max"}
_ACTIVATIONS = {"Identity": lambda x: x, "Tanh": jnp.tanh}


class DenseModule(NamedTuple):
    """A dense layer after the pooling, with its weights' folder, and a key of `_ACTIVATIONS`."""

    folder: str
    features: int
    bias: bool
    activation: str


class SentenceHead(nn.Module):
    """What makes an embedding of hidden states: a key of `POOLINGS`, and layers after it."""

    pooling: str
    layers: tuple[DenseModule, ...]

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Returns the [batch, features] float32 embeddings of texts, not normalised.

        Hidden states are [batch, tokens, width], and the mask [batch, tokens] is False at padding.
        """
        mask = jnp.ones(hidden.shape[:2], bool) if mask is None else mask
        pooled = POOLINGS[self.pooling](hidden, mask)
        for index, layer in enumerate(self.layers):
            product = dense(layer.features, jnp.float32, f"dense_{index}", use_bias=layer.bias)
            pooled = _ACTIVATIONS[layer.activation](product(pooled))
        return pooled


def head_of(modules: Mapping[str, Any]) -> SentenceHead | None:
    """Returns the head that `read_modules` found; None where nothing follows the pooling."""
    layers = tuple(DenseModule(**layer) for layer in modules["dense"])
    return SentenceHead(modules["pooling"], layers) if layers else None


def read_modules(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns what a folder of sentence-transformers states; None for another folder.

    These are JSON's values: `pooling`, a key of `POOLINGS`; `dense`, the attributes of each
    `DenseModule`; `max_seq_length`, the most tokens of a text, or None; `do_lower_case`; and
    `prompt`, what texts begin with unless another prompt is asked for by its name. Raises UserError
    if a file is damaged, or there is a module or a setting that is not supported.
    """
    path = folder / MODULES
    if not path.is_file():
        return None
    content = read_json(path, list)
    with as_user_error(
        f"{path} is damaged", "fetch it again", (AttributeError, KeyError, TypeError)
    ):
        modules = [(each["type"].rpartition(".")[2], each["path"]) for each in content]
    kinds = [kind for kind, _ in modules]
    if not _ORDER.fullmatch(" ".join(kinds)):
        raise UserError(
            f"{path}: its modules are {', '.join(kinds)}; expected Transformer, Pooling, maybe "
            "Dense, and maybe Normalize, in that order"
        )
    if modules[0][1]:
        raise UserError(
            f"{path}: its transformer is in {modules[0][1]}; expected it beside {path.name}"
        )
    transformer = [read_json(file) for file in sorted(folder.glob(_TRANSFORMER))[:1]]
    settings = transformer[0] if transformer else {}
    prompt = _default_prompt(folder / _PROMPTS, lower=settings.get("do_lower_case", False))
    return {
        "pooling": _read_pooling(folder / modules[1][1] / "config.json", prompt),
        "dense": [_read_dense(folder, name)._asdict() for kind, name in modules if kind == "Dense"],
        "max_seq_length": settings.get("max_seq_length"),
        "do_lower_case": settings.get("do_lower_case", False),
        "prompt": prompt,
    }


def _default_prompt(path, lower) -> str:
    if not path.is_file():
        return ""
    fields = read_json(path)
    prompt = (fields.get("prompts") or {}).get(fields.get("default_prompt_name")) or ""
    return prompt.lower() if lower else prompt


def _read_pooling(path, prompt) -> str:
    fields = read_json(path)
    named = fields.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or [])
    for field, chosen in fields.items():
        mode = re.fullmatch(r"pooling_mode_(\w+?)(_tokens?)?", field)
        if mode and chosen:
            modes.append(mode[1])
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise UserError(
            f"{path}: its pooling is {' and '.join(modes) or 'none'}; "
            f"expected one of {', '.join(_POOLINGS)}"
        )
    if prompt and not fields.get("include_prompt", True):
        raise UserError(
            f"{path}: the tokens of the prompt {prompt!r} are left out of the pooling "
            "(include_prompt is false), which is not supported"
        )
    return _POOLINGS[modes[0]]


def _read_dense(folder, name) -> DenseModule:
    path = folder / name / "config.json"
    fields = read_json(path)
    activation = str(fields.get("activation_function", "Tanh")).rpartition(".")[2]
    read = fields.get("module_input_name", "sentence_embedding")
    if activation not in _ACTIVATIONS or read != "sentence_embedding":
        raise UserError(
            f"{path}: its activation is {activation}, of {read}; expected "
            f"{' or '.join(_ACTIVATIONS)}, of sentence_embedding"
        )
    features = fields.get("out_features")
    if not isinstance(features, int):
        raise UserError(f"{path}: out_features is {features!r}; expected a number")
    return DenseModule(name, features, bool(fields.get("bias", True)), activation)

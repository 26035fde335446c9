"""Weights in Hugging Face's layout, read and written."""

from __future__ import annotations

import logging
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fne_jax.encoders import sentence_modules
from fne_jax.encoders.architectures import (
    build_from_architecture,
    config_json,
    model_type_of,
    read_architecture,
    towers_of,
)
from fne_jax.encoders.attention import ATTENTIONS, AUTO
from fne_jax.encoders.bert import Bert
from fne_jax.encoders.dual_encoder import DualEncoder
from fne_jax.encoders.hub_files import (
    CONFIG,
    INDEX,
    WEIGHTS,
    find_folder,
    read_tensors,
    weight_files,
)
from fne_jax.encoders.layouts import DENSE, IGNORED, PRODUCT, VALUE, Transform
from fne_jax.encoders.low_rank import merge_factors
from fne_jax.encoders.model_types import MODELS
from fne_jax.encoders.position_interpolation import resize_positions
from fne_jax.encoders.rematerialization import NONE, REMATS
from fne_jax.encoders.transformer import FROZEN_LAYERS, LAYERS
from fne_jax.encoders.vision_transformer import VisionTower
from fne_jax.errors import UserError
from fne_jax.files import write_atomically

_log = logging.getLogger(__name__)

_FLOATS = ("F16", "BF16", "F32", "F64")
# Glob patterns of what is downloaded.
_FILES = [CONFIG, "model*.safetensors", INDEX, *sentence_modules.FILES, sentence_modules.DENSE]


def load_pretrained(
    path_or_hub_name: str | os.PathLike,
    *,
    image_size: int | None = None,
    dtype: Any = jnp.float32,
    attention: str = AUTO,
    scan_layers: bool = False,
    remat: str = NONE,
    frozen_layers: int | str | None = None,
    revision: str | None = None,
) -> tuple[nn.Module, dict]:
    """Returns an encoder, or a pair of them, read from Hugging Face's layout.

    Model types `clip` and `siglip` give a `DualEncoder` of both towers with pooling "checkpoint";
    its params also hold the model's `logit_scale` and, for SigLIP, `logit_bias`, which the module
    does not read: similarities times exp(logit_scale), plus logit_bias, are the model's own logits.
    All others of `encoders.model_types.MODELS` give a tower of their own kind; from a folder of
    sentence-transformers that has dense layers, `pooled` is their output. Dropout is 0.

    Args:
      path_or_hub_name: A local folder, or a name on the Hugging Face hub; the hub's cache and
        HF_HUB_OFFLINE are respected.
      image_size: Pixels along a side, a multiple of the patch size. Where it differs from the
        checkpoint's, position embeddings are interpolated bicubically. None for the checkpoint's.
      dtype: Compute dtype.
      attention: How attention is computed: "xla", "splash", "cudnn", "head_loop", or "auto" for
        what suits the device and the number of tokens.
      scan_layers: Whether the layers' parameters are stacked along a leading axis, under one name,
        so that one layer is compiled and looped over.
      remat: What layers keep for the backward pass: "none" (is computed again), "products",
        "attention" or "full", as configs/base.py says.
      frozen_layers: How many layers are frozen, from the bottom, the embeddings with them; "all"
        for all parameters, None for none. Scanned, they are stacked under a name of their own.
      revision: Branch, tag or commit on the hub; a local folder has none.

    Returns:
      The module and its params, float32 arrays, for `module.apply({"params": params}, ...)`.

    Raises:
      UserError: if there is no such model, it is of another type, its weights are pickled, do not
        fit its config (all that do not are named), `image_size` does not fit its patches, or there
        is no such attention or remat.
    """
    known = {"attention": (attention, (AUTO, *ATTENTIONS)), "remat": (remat, REMATS)}
    for name, (value, values) in known.items():
        if value not in values:
            raise UserError(f"{name} is {value!r}; expected one of {', '.join(values)}")
    folder = find_folder(path_or_hub_name, revision, _FILES)
    module = build_from_architecture(read_architecture(folder), str(folder / CONFIG))
    where = f"{folder}: the weights are not those of the {model_type_of(module)} that {CONFIG}"
    weights = _collect(module, _tensors_of(folder, module), f"{where} describes")
    if image_size is not None:
        module = _resized(module, weights, image_size)
    options = {
        "dtype": dtype,
        "attention": attention,
        "scan_layers": scan_layers,
        "remat": remat,
        "frozen_layers": frozen_layers,
    }
    if isinstance(module, DualEncoder):
        image, text = (tower.clone(**options) for tower in (module.image, module.text))
        module = module.clone(image=image, text=text)
    else:
        module = module.clone(**options)
    return module, _params(module, weights)


def read_scalars(path_or_hub_name: str | os.PathLike, model_type: str | None) -> dict[str, float]:
    """Returns what a CLIP or SigLIP learned beside its towers: `logit_scale`, and `logit_bias`.

    `model_type` is what its config.json says; other types have none. Raises UserError if there is
    no such model, or its weights are pickled or damaged.
    """
    names = MODELS[model_type].scalars if model_type in MODELS else {}
    if not names:
        return {}
    folder = find_folder(path_or_hub_name, None, _FILES)
    tensors = read_tensors(weight_files(folder))
    named = ((_plain_name(name, model_type), read) for name, _, _, read in tensors)
    return {name: read().item() for name, read in named if name in names}


def save_pretrained(path: str | os.PathLike, module: nn.Module, params: Mapping) -> None:
    """Writes an encoder as Hugging Face's transformers would: config.json, model.safetensors.

    Weights are float32. A `logit_scale` or `logit_bias` that the params of a CLIP or SigLIP lack,
    because it was not trained with one, is written with the value that their authors begin with.

    Args:
      path: The folder, made if need be; other files in it stay.
      module: A tower of a model of its own, such as a `VisionTransformer` or a `Bert`, or a
        `DualEncoder` of CLIP's or SigLIP's towers without a projection of its own.
      params: Its parameters, with layers stacked or not. Low-rank changes are added to the kernels.

    Raises:
      UserError: if the module is of another kind or ends in dense layers of sentence-transformers,
        the params are not those of the module (all that differ are named), or the path is a file.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder to write {CONFIG} and {WEIGHTS} into")
    model_type = model_type_of(module)
    if any(_dense_layers(tower) for tower in towers_of(module).values()):
        raise UserError(
            f"this {model_type} ends in dense layers of sentence-transformers, which transformers' "
            "models have no place for"
        )
    weights = {
        **MODELS[model_type].scalars,
        **_unstack_layers(flax.traverse_util.flatten_dict(merge_factors(params), sep="/")),
    }
    wrong = _differences({name: np.shape(x) for name, x in weights.items()}, _shapes(module))
    if wrong:
        raise UserError(f"params are not those of this {model_type}: {'; '.join(wrong)}")
    tensors = {
        name: np.asarray(_join(weights, paths, transform), np.float32, order="C")
        for name, (paths, transform) in _names(module).items()
    }
    config = config_json(module)
    path.mkdir(parents=True, exist_ok=True)
    # Not save_file, whose files only their owner may read.
    write_atomically(path / WEIGHTS, safetensors.numpy.save(tensors, {"format": "pt"}))
    write_atomically(path / CONFIG, config)


def _names(module) -> dict[str, tuple[list[str], Transform]]:
    """Maps each tensor of the module's file to the paths of its parts and their transform."""
    entries = [(name, name, VALUE) for name in MODELS[model_type_of(module)].scalars]
    for begin, tower in towers_of(module).items():
        layout = tower.layout
        entries += [(begin + ours, theirs, kind) for ours, theirs, kind in layout.weights]
        entries += [
            (f"{begin}encoder/layer_{layer}/{ours}", layout.layer.format(layer) + theirs, kind)
            for layer in range(tower.layers)
            for ours, theirs, kind in layout.layer_weights
        ]
        entries += [
            (f"{begin}sentence_head/dense_{index}", f"{layer.folder}.linear", kind)
            for index, layer in enumerate(_dense_layers(tower))
            for kind in (DENSE if layer.bias else PRODUCT,)
        ]
    names = {}
    for ours, theirs, kind in entries:
        for our_end, their_end, transform in kind:
            names.setdefault(theirs + their_end, ([], transform))[0].append(ours + our_end)
    return names


def _dense_layers(tower) -> tuple[sentence_modules.DenseModule, ...]:
    head = tower.sentence_head if isinstance(tower, Bert) else None
    return head.layers if head else ()


def _shapes(module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters by path, layers unstacked, scalars included."""
    shapes = {name: value.shape for name, value in MODELS[model_type_of(module)].scalars.items()}
    for begin, tower in towers_of(module).items():
        if isinstance(tower, VisionTower):
            inputs = (jnp.zeros((1, tower.image_size, tower.image_size, 3), jnp.float32),)
        else:
            inputs = (jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
        plain = tower.clone(scan_layers=False, remat=NONE, lora_rank=0)
        variables = jax.eval_shape(plain.init, jax.random.key(0), *inputs)
        flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
        shapes.update({begin + path: value.shape for path, value in flat.items()})
    return shapes


def _join(weights: Mapping[str, np.ndarray], paths, transform) -> np.ndarray:
    """Returns the tensor in Hugging Face's layout that the parameters at these paths make up."""
    parts = [transform.save(np.asarray(weights[path])) for path in paths]
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def params_from_tensors(
    module: nn.Module, tensors: Mapping[str, np.ndarray], where: str
) -> dict[str, Any]:
    """Returns the params of a tower from float tensors under transformers' names.

    Those that no encoder needs may be among them; `where` tells what holds them. Raises UserError,
    naming all that are missing, unexpected or of a wrong shape.
    """
    entries = [(name, x.shape, "F32", lambda x=x: x) for name, x in tensors.items()]
    return _params(module, _collect(module, entries, where))


def _params(module, weights) -> dict[str, Any]:
    """Returns the params of a module, of its parameters by path, layers unstacked."""
    if any(tower.scan_layers for tower in towers_of(module).values()):
        weights = _stack_layers(weights, module)
    # Copies, because on a CPU an array may otherwise share the memory of NumPy's.
    params = {path: jnp.array(value) for path, value in weights.items()}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _tensors_of(folder, module):
    """Yields what `read_tensors` does, those of dense layers under the names of their folders."""
    yield from read_tensors(weight_files(folder))
    for tower in towers_of(module).values():
        for layer in _dense_layers(tower):
            for name, *rest in read_tensors(weight_files(folder / layer.folder)):
                yield f"{layer.folder}.{name}", *rest


def _collect(module, entries, where) -> dict[str, np.ndarray]:
    """Returns the parameters by path, float32, layers unstacked, of what `read_tensors` yields."""
    names = _names(module)
    # Without memory of their own, whatever the sizes.
    blanks = {path: np.broadcast_to(np.float32(0), s) for path, s in _shapes(module).items()}
    expected = {name: _join(blanks, *parts).shape for name, parts in names.items()}
    model_type = model_type_of(module)
    found, wrong, weights = {}, [], {}
    for key, shape, dtype, read in entries:
        name = _plain_name(key, model_type)
        if IGNORED.match(name):
            continue
        found[name] = shape
        if dtype not in _FLOATS:
            wrong.append(f"{name} is of type {dtype}, no float")
        elif shape == expected.get(name):
            weights.update(_split(read(), *names[name]))
    wrong += _differences(found, expected)
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}. Take both files from the same model.")
    return weights


def _split(tensor, paths, transform) -> dict[str, np.ndarray]:
    """Returns the parameters that a tensor in Hugging Face's layout is made up of, by path."""
    tensor = tensor.astype(np.float32)
    parts = np.split(tensor, len(paths)) if len(paths) > 1 else [tensor]
    return {path: transform.load(part) for path, part in zip(paths, parts, strict=True)}


def _plain_name(name: str, model_type: str) -> str:
    """Returns a tensor's name without the model's prefix and TensorFlow's words for LayerNorm."""
    name = name.removeprefix(f"{MODELS[model_type].prefix or model_type}.")
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))


def _differences(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> list[str]:
    """Returns what is missing, unexpected or of a wrong shape, in words."""

    def named(word, names: Iterable[str]):
        return [f"{word} {', '.join(names)}"] if names else []

    return (
        named("missing", [name for name in expected if name not in found])
        + named("unexpected", [name for name in found if name not in expected])
        + [
            f"{name} is {found[name]}, expected {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ]
    )


def _stack_layers(weights: Mapping[str, Any], module) -> dict[str, Any]:
    """Returns the parameters with those of all layers stacked, as scanned layers hold them."""
    stacked = {k: v for k, v in weights.items() if "encoder/layer_" not in k}
    for begin, tower in towers_of(module).items():
        first = f"{begin}encoder/layer_0/"
        depth = tower.frozen_depth
        for end in [k.removeprefix(first) for k in weights if k.startswith(first)]:
            for name, indices in (
                (FROZEN_LAYERS, range(depth)),
                (LAYERS, range(depth, tower.layers)),
            ):
                if indices:
                    layers = [weights[f"{begin}encoder/layer_{i}/{end}"] for i in indices]
                    stacked[f"{begin}encoder/{name}/{end}"] = np.stack(layers)
    return stacked


def _unstack_layers(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with stacked layers taken apart; others stay as they are."""
    unstacked = {}
    for path, value in weights.items():
        stack = re.fullmatch(rf"(.*)encoder/({FROZEN_LAYERS}|{LAYERS})/(.*)", path)
        if stack is None:
            unstacked[path] = value
            continue
        begin, name, end = stack.groups()
        below = weights.get(f"{begin}encoder/{FROZEN_LAYERS}/{end}", ()) if name == LAYERS else ()
        for index, layer in enumerate(np.asarray(value), len(below)):
            unstacked[f"{begin}encoder/layer_{index}/{end}"] = layer
    return unstacked


def _resized(module, weights: dict[str, np.ndarray], image_size: int) -> nn.Module:
    """Returns the module for images of that size, interpolating the positions in `weights`."""
    begin, tower = next(iter(towers_of(module).items()))
    if not isinstance(tower, VisionTower):
        raise UserError(f"image_size is {image_size}, but this model reads no images; leave it out")
    if image_size == tower.image_size:
        return module
    if image_size < 1 or image_size % tower.patch_size:
        raise UserError(
            f"image_size is {image_size}; expected a multiple of the checkpoint's patch size, "
            f"{tower.patch_size}"
        )
    path = f"{begin}position_embedding"
    if path in weights:  # otherwise the tower computes its positions
        old, new = tower.image_size // tower.patch_size, image_size // tower.patch_size
        weights[path] = resize_positions(weights[path], old, new, antialias=tower.antialias)
        _log.info(
            "position embeddings interpolated bicubically: %d x %d patches of images of %d pixels, "
            "from %d x %d of %d",
            *(new, new, image_size, old, old, tower.image_size),
        )
    tower = tower.clone(image_size=image_size)
    return module.clone(image=tower) if begin else tower

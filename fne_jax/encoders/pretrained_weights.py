"""Weights in Hugging Face's layout, read and written: ViT, BERT, CLIP and SigLIP.

A folder holds `config.json` and `model.safetensors`, or several files of weights and
`model.safetensors.index.json`. One table for each encoder says which field and which tensor of
theirs is which attribute and which parameter of ours; reading and writing both follow it. Pickled
weights are never opened.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fne_jax.encoders.bert import Bert
from fne_jax.encoders.clip import ClipText, ClipVision
from fne_jax.encoders.dual_encoder import CHECKPOINT, DualEncoder
from fne_jax.encoders.siglip import SiglipText, SiglipVision
from fne_jax.encoders.transformer import ACTIVATIONS, Tower
from fne_jax.encoders.vision_transformer import VisionTower, VisionTransformer
from fne_jax.errors import UserError

_log = logging.getLogger(__name__)

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FLOATS = ("F16", "BF16", "F32", "F64")

# The parameter of PyTorch's cubic convolution, by which position embeddings are interpolated.
_CUBIC = -0.75


class _Transform(NamedTuple):
    """How a tensor of theirs becomes a parameter of ours, and back."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _product_of(convolution):
    return convolution.transpose(2, 3, 1, 0).reshape(-1, len(convolution))


def _convolution_of(product):
    side = math.isqrt(len(product) // 3)
    return product.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


_SAME = _Transform(lambda x: x, lambda x: x)
_TRANSPOSED = _Transform(np.transpose, np.transpose)
_CONVOLUTION = _Transform(_product_of, _convolution_of)
_ONE_AXIS_LESS = _Transform(lambda x: x[None], lambda x: x[0])
_TWO_AXES_LESS = _Transform(lambda x: x[None, None], lambda x: x[0, 0])

# What an entry of the tables below holds: the ends of our paths, of their names, and the transform.
_VALUE = (("", "", _SAME),)
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


class _Layout(NamedTuple):
    """What Hugging Face calls the parts of one of our towers.

    Attributes:
      fields: our attributes and the fields of their configs.
      fixed: fields of their configs for which our tower has one value only.
      weights: our paths, their names and what they hold.
      layer: their name of layer {}; ours is `encoder/layer_{}`.
      layer_weights: as `weights`, within a layer.
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

_LAYOUTS: dict[type[Tower], _Layout] = {
    VisionTransformer: _Layout(
        fields=_IMAGE_SIZES,
        fixed={"num_channels": 3, "qkv_bias": True},
        weights=(
            ("class_token", "embeddings.cls_token", _VALUE),
            ("position_embedding", "embeddings.position_embeddings", _VALUE),
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
    Bert: _Layout(
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
    ClipVision: _Layout(
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
    ClipText: _Layout(
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
    SiglipVision: _Layout(
        fields=_IMAGE_SIZES,
        fixed={"num_channels": 3, "vision_use_head": True},
        weights=(
            ("position_embedding", "vision_model.embeddings.position_embedding", _POSITIONS),
            ("patch_embedding", "vision_model.embeddings.patch_embedding", _PATCHES),
            ("final_norm", "vision_model.post_layernorm", _NORM),
            ("head/probe", "vision_model.head.probe", _VALUE),
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
    SiglipText: _Layout(
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


class _Model(NamedTuple):
    """One of their model types: its class, our towers, and its scalars with their first values."""

    architecture: str
    towers: tuple[type[Tower], ...]
    scalars: Mapping[str, np.ndarray]


_MODELS = {
    "vit": _Model("ViTModel", (VisionTransformer,), {}),
    "bert": _Model("BertModel", (Bert,), {}),
    "clip": _Model(
        "CLIPModel",
        (ClipVision, ClipText),
        {"logit_scale": np.asarray(np.log(1 / 0.07), np.float32)},
    ),
    "siglip": _Model(
        "SiglipModel",
        (SiglipVision, SiglipText),
        {
            "logit_scale": np.asarray([np.log(10)], np.float32),
            "logit_bias": np.asarray([-10], np.float32),
        },
    ),
}

# Entries of files that no encoder needs: heads for other tasks, and buffers.
_IGNORED = re.compile(
    r"(classifier|pooler|cls|decoder|lm_head|qa_outputs)\."
    r"|(.*\.)?(position_ids|token_type_ids|mask_token|num_batches_tracked)$"
)


def load_pretrained(
    path_or_hub_name: str | os.PathLike,
    *,
    image_size: int | None = None,
    dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: bool = False,
    revision: str | None = None,
) -> tuple[nn.Module, dict]:
    """Reads an encoder, or a pair of them, in Hugging Face's layout.

    Model types `vit` and `bert` give a `VisionTransformer` and a `Bert`. `clip` and `siglip` give
    a `DualEncoder` of both towers with pooling "checkpoint"; its params also hold the model's
    `logit_scale` and, for SigLIP, `logit_bias`, which the module does not read: similarities
    times exp(logit_scale), plus logit_bias, are the model's own logits. Dropout is 0.

    Args:
      path_or_hub_name: a local folder, or a name on the Hugging Face hub; the hub's cache and
        HF_HUB_OFFLINE are respected.
      image_size: pixels of a side, a multiple of the patch size. Where it differs from the
        checkpoint's, position embeddings are interpolated bicubically. None for the checkpoint's.
      dtype: compute dtype.
      scan_layers: see `TransformerStack`.
      remat: see `TransformerStack`.
      revision: branch, tag or commit on the hub; a local folder has none.

    Returns:
      The module and its params, float32 arrays, for `module.apply({"params": params}, ...)`.

    Raises:
      UserError: if there is no such model, it is of another type, its weights are pickled, do not
        fit its config (all that do not are named), or `image_size` does not fit its patches.
    """
    folder = _find_folder(path_or_hub_name, revision, [_CONFIG, "model*.safetensors", _INDEX])
    module = build_from_architecture(_read_config(folder), str(folder / _CONFIG))
    weights = _read_weights(folder, module)
    if image_size is not None:
        _resize_positions(module, weights, image_size)
    module = _with_options(module, image_size, dtype, scan_layers, remat)
    if scan_layers:
        weights = _stack_layers(weights, module)
    # Copies, because on a CPU an array may otherwise share the memory of NumPy's.
    params = {path: jnp.array(value) for path, value in weights.items()}
    return module, flax.traverse_util.unflatten_dict(params, sep="/")


def read_architecture(path_or_hub_name: str | os.PathLike, revision: str | None = None) -> dict:
    """Returns the content of a model's config.json, from a local folder or the hub.

    Raises:
      UserError: if there is no such model.
    """
    folder = _find_folder(path_or_hub_name, revision, [_CONFIG])
    return _read_config(folder)


def save_pretrained(path: str | os.PathLike, module: nn.Module, params: Mapping) -> None:
    """Writes an encoder as Hugging Face's transformers would: config.json, model.safetensors.

    Weights are float32. A `logit_scale` or `logit_bias` that the params of a CLIP or SigLIP lack,
    because it was not trained with one, is written with the value that their authors begin with.

    Args:
      path: the folder, made if need be; other files in it stay.
      module: a `VisionTransformer`, a `Bert`, or a `DualEncoder` of CLIP's or SigLIP's towers
        without a projection of its own.
      params: its parameters, with layers stacked or not.

    Raises:
      UserError: if the module is another, the params are not its (all that are not are named), or
        the path is a file.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder to write {_CONFIG} and {_WEIGHTS} into")
    model_type = _model_type(module)
    weights = {
        **_MODELS[model_type].scalars,
        **_unstack_layers(flax.traverse_util.flatten_dict(dict(params), sep="/")),
    }
    wrong = _differences({name: np.shape(x) for name, x in weights.items()}, _shapes(module))
    if wrong:
        raise UserError(f"params are not those of this {model_type}: {'; '.join(wrong)}")
    tensors = {
        name: np.asarray(_join(weights, paths, transform), np.float32, order="C")
        for name, (paths, transform) in _names(module).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        scratch = pathlib.Path(scratch)
        # Not save_file, whose files only their owner may read.
        (scratch / _WEIGHTS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
        (scratch / _CONFIG).write_text(_config_of(module, model_type), "utf-8")
        path.mkdir(exist_ok=True)
        for name in (_WEIGHTS, _CONFIG):
            os.replace(scratch / name, path / name)


def _find_folder(path_or_hub_name, revision, patterns) -> pathlib.Path:
    """Returns the local folder, or that into which the hub's client has put the files."""
    path = pathlib.Path(path_or_hub_name).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_hub_name)
    # Heavy, and needed for names only.
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:  # Of many unrelated classes: names, network, rights, the cache.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name!r} is neither a local folder nor a model that the Hugging Face hub gave "
            f"({reason}). Give a folder that holds {_CONFIG} and {_WEIGHTS}; where there is no "
            f"network, fetch it elsewhere with `hf download NAME --local-dir FOLDER`."
        ) from error
    return pathlib.Path(folder)


def _read_config(folder) -> dict:
    path = folder / _CONFIG
    if not path.exists():
        raise UserError(f"{folder} holds no {_CONFIG}; give the folder of a Hugging Face model")
    return _read_json(path)


def _parse_config(fields, where):
    """Returns transformers' config, which knows the defaults of fields that files leave out."""
    model_type = fields.get("model_type")
    if model_type not in _MODELS:
        raise UserError(
            f"{where}: model_type is {model_type!r}; expected one of {', '.join(_MODELS)}"
        )
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        return transformers.CONFIG_MAPPING[model_type].from_dict(dict(fields))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{where} is no config of a {model_type}: {error}") from error


def _read_json(path):
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object); fetch it again")
    return content


def build_from_architecture(fields: Mapping[str, Any], where: str) -> nn.Module:
    """Returns the module that `load_pretrained` would, from `read_architecture`'s fields alone.

    Args:
      fields: the content of a config.json.
      where: the file's name, for errors.

    Raises:
      UserError: if the model is of another type or size than is supported.
    """
    config = _parse_config(fields, where)
    towers = _MODELS[config.model_type].towers
    if len(towers) == 1:
        return _build_tower(towers[0], config, f"{where}: ")
    image, text = (
        _build_tower(tower, getattr(config, part), f"{where}: {part}.")
        for tower, part in zip(towers, ("vision_config", "text_config"), strict=True)
    )
    if config.model_type == "clip":
        # That of the parts is for towers published by themselves, and often wrong in a pair.
        image, text = (tower.clone(projection_dim=config.projection_dim) for tower in (image, text))
    return DualEncoder(image=image, text=text, image_pooling=CHECKPOINT, text_pooling=CHECKPOINT)


def _build_tower(tower, config, where) -> Tower:
    layout = _LAYOUTS[tower]
    for field, value in layout.fixed.items():
        if getattr(config, field, value) != value:
            raise UserError(
                f"{where}{field} is {getattr(config, field)!r}; only {value!r} is supported"
            )
    sizes = {ours: getattr(config, field) for ours, field in layout.fields.items()}
    for name in ("image_size", "patch_size"):
        # May be stated as height and width.
        if isinstance(sizes.get(name), list | tuple) and len(set(sizes[name])) == 1:
            sizes[name] = sizes[name][0]
    for name, value in sizes.items():
        if name not in ("activation", "norm_epsilon") and not isinstance(value, int):
            raise UserError(
                f"{where}{layout.fields[name]} is {value!r}; only a number is supported"
            )
    if sizes["activation"] not in ACTIVATIONS:
        raise UserError(
            f"{where}hidden_act is {sizes['activation']!r}; "
            f"expected one of {', '.join(ACTIVATIONS)}"
        )
    if sizes["width"] % sizes["heads"]:
        raise UserError(
            f"{where}hidden_size is {sizes['width']}, which {sizes['heads']} heads do not divide"
        )
    return tower(**sizes)


def _model_type(module) -> str:
    """Returns the type that the module can be saved as."""
    own_projection = isinstance(module, DualEncoder) and module.projection_dim
    towers = tuple(type(tower) for tower in _towers(module).values())
    for name, model in _MODELS.items():
        if towers == model.towers and not own_projection:
            return name
    raise UserError(
        "save_pretrained writes a VisionTransformer, a Bert, or a DualEncoder of CLIP's or "
        "SigLIP's towers without a projection of its own; got "
        f"{type(module).__name__} of {', '.join(tower.__name__ for tower in towers)}. Save the "
        "towers of other pairs one by one."
    )


def _config_of(module, model_type) -> str:
    """Returns the content of config.json."""
    import transformers

    parts = [
        {field: getattr(tower, ours) for ours, field in _LAYOUTS[type(tower)].fields.items()}
        for tower in _towers(module).values()
    ]
    if len(parts) == 1:
        fields = parts[0]
    else:
        fields = dict(zip(("vision_config", "text_config"), parts, strict=True))
    if model_type == "clip":
        fields["projection_dim"] = module.image.projection_dim
    config = transformers.CONFIG_MAPPING[model_type](
        **fields, architectures=[_MODELS[model_type].architecture], dtype="float32"
    )
    return config.to_json_string()


def _towers(module) -> dict[str, nn.Module]:
    """Returns the towers by the beginning of their parameters' paths."""
    if isinstance(module, DualEncoder):
        return {"image/": module.image, "text/": module.text}
    return {"": module}


def _change_towers(module, change):
    """Returns the module with `change` applied to its towers."""
    if isinstance(module, DualEncoder):
        return module.clone(image=change(module.image), text=change(module.text))
    return change(module)


def _names(module) -> dict[str, tuple[list[str], _Transform]]:
    """Maps each tensor of the module's file to the paths of its parts and their transform."""
    entries = [(name, name, _VALUE) for name in _MODELS[_model_type(module)].scalars]
    for begin, tower in _towers(module).items():
        layout = _LAYOUTS[type(tower)]
        entries += [(begin + ours, theirs, kind) for ours, theirs, kind in layout.weights]
        entries += [
            (f"{begin}encoder/layer_{layer}/{ours}", layout.layer.format(layer) + theirs, kind)
            for layer in range(tower.layers)
            for ours, theirs, kind in layout.layer_weights
        ]
    names = {}
    for ours, theirs, kind in entries:
        for our_end, their_end, transform in kind:
            names.setdefault(theirs + their_end, ([], transform))[0].append(ours + our_end)
    return names


def _shapes(module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters by path, layers unstacked, scalars included."""
    shapes = {name: value.shape for name, value in _MODELS[_model_type(module)].scalars.items()}
    for begin, tower in _towers(module).items():
        if isinstance(tower, VisionTower):
            inputs = (jnp.zeros((1, tower.image_size, tower.image_size, 3)),)
        else:
            inputs = (jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
        plain = tower.clone(scan_layers=False, remat=False)
        variables = jax.eval_shape(plain.init, jax.random.key(0), *inputs)
        flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
        shapes.update({begin + path: value.shape for path, value in flat.items()})
    return shapes


def _join(weights: Mapping[str, np.ndarray], paths, transform) -> np.ndarray:
    """Returns the tensor of theirs that the parameters at these paths make up."""
    parts = [transform.save(np.asarray(weights[path])) for path in paths]
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def params_from_tensors(
    module: nn.Module, tensors: Mapping[str, np.ndarray], where: str
) -> dict[str, Any]:
    """Returns a module's params from tensors under transformers' names.

    Args:
      module: a `VisionTransformer` or a `Bert`.
      tensors: float arrays; those that no encoder needs may be among them.
      where: what holds them, for errors.

    Raises:
      UserError: naming all that are missing, unexpected or of a wrong shape.
    """
    entries = ((name, value.shape, "F32", value) for name, value in tensors.items())
    weights = _collect(module, ((n, s, t, lambda v=v: v) for n, s, t, v in entries), where)
    if any(tower.scan_layers for tower in _towers(module).values()):
        weights = _stack_layers(weights, module)
    params = {path: jnp.array(value) for path, value in weights.items()}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _read_weights(folder, module) -> dict[str, np.ndarray]:
    """Returns the parameters by path, float32, layers unstacked."""
    model_type = _model_type(module)
    where = f"{folder}: the weights are not those of the {model_type} that {_CONFIG} describes"
    return _collect(module, _entries(_weight_files(folder)), where)


def _entries(paths):
    """Yields name, shape, dtype and reader of every tensor of some files."""
    for path in paths:
        try:
            with safetensors.safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118, the file is no mapping
                    entry = file.get_slice(key)
                    yield (
                        key,
                        tuple(entry.get_shape()),
                        entry.get_dtype(),
                        functools.partial(file.get_tensor, key),
                    )
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from error


def _collect(module, entries, where) -> dict[str, np.ndarray]:
    """Returns the parameters by path, float32, layers unstacked, of entries as `_entries`'s."""
    names = _names(module)
    # Without memory of their own, whatever the sizes.
    blanks = {path: np.broadcast_to(np.float32(0), s) for path, s in _shapes(module).items()}
    expected = {name: _join(blanks, *parts).shape for name, parts in names.items()}
    model_type = _model_type(module)
    found, wrong, weights = {}, [], {}
    for key, shape, dtype, read in entries:
        name = _plain_name(key, model_type)
        if _IGNORED.match(name):
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
    """Undoes `_join`."""
    tensor = tensor.astype(np.float32)
    parts = np.split(tensor, len(paths)) if len(paths) > 1 else [tensor]
    return {path: transform.load(part) for path, part in zip(paths, parts, strict=True)}


def _weight_files(folder) -> list[pathlib.Path]:
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).exists():
        index = _read_json(folder / _INDEX)
        paths = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
        absent = [path.name for path in paths if not path.exists()]
        if absent or not paths:
            raise UserError(
                f"{folder / _INDEX} names files that are not beside it: "
                f"{', '.join(absent) or 'none at all'}; fetch the model again"
            )
        return paths
    pickled = [name for name in _PICKLES if (folder / name).exists()]
    raise UserError(
        f"{folder} holds no {_WEIGHTS}"
        + (
            f", only {pickled[0]}, a pickle, which could run any code when opened"
            if pickled
            else ""
        )
        + ". Convert the weights to safetensors, e.g. by save_pretrained of transformers with "
        "PyTorch, or take a revision of the model that has them."
    )


def _plain_name(name: str, model_type: str) -> str:
    """Returns a tensor's name without the model's prefix and TensorFlow's words for LayerNorm."""
    name = name.removeprefix(f"{model_type}.")
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
    """Moves the parameters of layers 0, 1, ... into the layout of scanned layers."""
    stacked = {k: v for k, v in weights.items() if "encoder/layer_" not in k}
    for begin, tower in _towers(module).items():
        first = f"{begin}encoder/layer_0/"
        for end in [k.removeprefix(first) for k in weights if k.startswith(first)]:
            stacked[f"{begin}encoder/layers/{end}"] = np.stack(
                [weights[f"{begin}encoder/layer_{i}/{end}"] for i in range(tower.layers)]
            )
    return stacked


def _unstack_layers(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `_stack_layers`; unstacked layers stay as they are."""
    unstacked = {}
    for path, value in weights.items():
        begin, found, end = path.partition("encoder/layers/")
        layers = (
            {f"{begin}encoder/layer_{i}/{end}": v for i, v in enumerate(np.asarray(value))}
            if found
            else {path: value}
        )
        unstacked.update(layers)
    return unstacked


def _with_options(module, image_size, dtype, scan_layers, remat) -> nn.Module:
    """Returns the module for images of that size, or the checkpoint's, with compute options."""

    def change(tower):
        if image_size is not None and isinstance(tower, VisionTower):
            _check_image_size(tower, image_size)
            tower = tower.clone(image_size=image_size)
        return tower.clone(dtype=dtype, scan_layers=scan_layers, remat=remat)

    if image_size is not None and not isinstance(next(iter(_towers(module).values())), VisionTower):
        raise UserError(f"image_size is {image_size}, but this model reads no images; leave it out")
    return _change_towers(module, change)


def _check_image_size(tower, image_size):
    if image_size == tower.image_size:
        return
    if image_size < 1 or image_size % tower.patch_size:
        raise UserError(
            f"image_size is {image_size}; expected a multiple of the checkpoint's patch size, "
            f"{tower.patch_size}"
        )


def _resize_positions(module, weights: dict[str, np.ndarray], image_size: int) -> None:
    """Interpolates the image tower's positions in `weights` for images of that size."""
    begin, tower = next(iter(_towers(module).items()))
    if not isinstance(tower, VisionTower) or image_size == tower.image_size:
        return
    _check_image_size(tower, image_size)
    old, new = tower.image_size // tower.patch_size, image_size // tower.patch_size
    positions = weights[f"{begin}position_embedding"]
    class_tokens = positions.shape[1] - old**2
    grid = positions[0, class_tokens:].reshape(old, old, -1)
    matrix = _cubic_matrix(old, new)
    grid = np.einsum("yi,xj,ijd->yxd", matrix, matrix, grid, optimize=True)
    weights[f"{begin}position_embedding"] = np.concatenate(
        [positions[:, :class_tokens], grid.reshape(1, new**2, -1).astype(np.float32)], axis=1
    )
    _log.info(
        "position embeddings interpolated bicubically: %d x %d patches of images of %d pixels, "
        "from %d x %d of %d",
        *(new, new, image_size, old, old, tower.image_size),
    )


def _cubic_matrix(old: int, new: int) -> np.ndarray:
    """Returns the [new, old] weights of cubic convolution along one axis, without antialiasing.

    Points are at the centres of equal cells; beyond the ends the outermost point is repeated.
    """
    place = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.floor(place).astype(int) + tap
        far = np.abs(place - index)
        near_weight = (_CUBIC + 2) * far**3 - (_CUBIC + 3) * far**2 + 1
        far_weight = _CUBIC * (far**3 - 5 * far**2 + 8 * far - 4)
        weight = np.where(far <= 1, near_weight, far_weight)
        np.add.at(matrix, (np.arange(new), np.clip(index, 0, old - 1)), weight)
    return matrix

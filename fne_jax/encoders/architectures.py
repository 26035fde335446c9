"""Modules from the config.json of Hugging Face's models, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from fne_jax.encoders import sentence_modules
from fne_jax.encoders.bert import Bert
from fne_jax.encoders.dual_encoder import CHECKPOINT, DualEncoder
from fne_jax.encoders.hub_files import CONFIG, find_folder, read_config, read_json
from fne_jax.encoders.layers import ACTIVATIONS
from fne_jax.encoders.model_types import MODELS
from fne_jax.encoders.transformer import Tower
from fne_jax.errors import UserError

# On types that are taken for others.
_ADVICE = {
    "siglip2": ". This is a NaFlex model, for images of any shape; SigLIP 2's models of a fixed "
    "resolution are of the type siglip",
}
# The keys of what is no part of a config.json, but of the folder around it.
SENTENCE_MODULES = "sentence_transformers"
LOWER_CASE = "do_lower_case"
_TOKENIZER = "tokenizer_config.json"


def read_architecture(
    path_or_hub_name: str | os.PathLike, revision: str | None = None
) -> dict[str, Any]:
    """Returns the content of a model's config.json, from a local folder or the hub.

    It also has, under `LOWER_CASE`, what its tokenizer's settings say of that, if anything; and for
    a folder of sentence-transformers, under `SENTENCE_MODULES`, what `read_modules` returns. Raises
    UserError if there is no such model.
    """
    folder = find_folder(path_or_hub_name, revision, [CONFIG, _TOKENIZER, *sentence_modules.FILES])
    fields, modules = read_config(folder), sentence_modules.read_modules(folder)
    tokenizer = read_json(folder / _TOKENIZER) if (folder / _TOKENIZER).is_file() else {}
    fields |= {LOWER_CASE: tokenizer[LOWER_CASE]} if LOWER_CASE in tokenizer else {}
    return fields | ({SENTENCE_MODULES: modules} if modules else {})


def build_from_architecture(fields: Mapping[str, Any], where: str) -> nn.Module:
    """Returns the module that `load_pretrained` would, from `read_architecture`'s fields alone.

    `where` is the file's name, for errors. Raises UserError if the model is of another type or size
    than is supported.
    """
    config = _parse_config(fields, where)
    towers = MODELS[config.model_type].towers
    if len(towers) == 1:
        tower = _build_tower(towers[0], config, f"{where}: ")
        modules = fields.get(SENTENCE_MODULES)
        if not modules:
            return tower
        if not isinstance(tower, Bert):
            raise UserError(
                f"{where} is of type {config.model_type}, which is no encoder of texts, but there "
                f"are modules of sentence-transformers beside it ({sentence_modules.MODULES})"
            )
        return tower.clone(sentence_head=sentence_modules.head_of(modules))
    image, text = (
        _build_tower(tower, getattr(config, part), f"{where}: {part}.")
        for tower, part in zip(towers, ("vision_config", "text_config"), strict=True)
    )
    if config.model_type == "clip":
        # That of the parts is for towers published by themselves, and often wrong in a pair.
        image, text = (tower.clone(projection_dim=config.projection_dim) for tower in (image, text))
    return DualEncoder(image=image, text=text, image_pooling=CHECKPOINT, text_pooling=CHECKPOINT)


def _parse_config(fields, where):
    """Returns transformers' config, which knows the defaults of fields that files leave out."""
    model_type = fields.get("model_type")
    if model_type not in MODELS:
        raise UserError(
            f"{where}: model_type is {model_type!r}; expected one of {', '.join(MODELS)}"
            + _ADVICE.get(model_type, "")
        )
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        return transformers.CONFIG_MAPPING[model_type].from_dict(dict(fields))
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is no config of a {model_type}: {reason}") from error


def _build_tower(tower, config, where) -> Tower:
    layout = tower.layout

    def refuse(field, why):
        raise UserError(f"{where}{field} is {getattr(config, field)!r}{why}")

    for field, value in layout.fixed.items():
        if getattr(config, field, value) != value:
            refuse(field, f"; only {value!r} is supported")
    sizes = {ours: getattr(config, field) for ours, field in layout.fields.items()}
    for name in ("image_size", "patch_size"):
        # May be stated as height and width.
        if isinstance(sizes.get(name), list | tuple) and len(set(sizes[name])) == 1:
            sizes[name] = sizes[name][0]
    for name, value in sizes.items():
        if name not in ("activation", "norm_epsilon") and not isinstance(value, int):
            refuse(layout.fields[name], "; only a number is supported")
    if sizes["activation"] not in ACTIVATIONS:
        refuse(layout.fields["activation"], f"; expected one of {', '.join(ACTIVATIONS)}")
    if sizes["width"] % sizes["heads"]:
        refuse(layout.fields["width"], f", which {sizes['heads']} heads do not divide")
    for name in layout.ratios:
        sizes[name] *= sizes["width"]
    return tower(**sizes)


def model_type_of(module: nn.Module) -> str:
    """Returns the type that the module can be saved as; raises UserError if there is none."""
    own_projection = isinstance(module, DualEncoder) and module.projection_dim
    towers = tuple(type(tower) for tower in towers_of(module).values())
    for name, model in MODELS.items():
        if towers == model.towers and not own_projection:
            return name
    raise UserError(
        "save_pretrained writes a tower of a model of its own, such as a VisionTransformer or a "
        "Bert, or a DualEncoder of CLIP's or SigLIP's towers without a projection of its own; got "
        f"{type(module).__name__} of {', '.join(tower.__name__ for tower in towers)}. Save the "
        "towers of other pairs one by one."
    )


def config_json(module: nn.Module) -> str:
    """Returns the content of a module's config.json, as transformers writes it."""
    import transformers

    model_type = model_type_of(module)
    parts = [_fields_of(tower) for tower in towers_of(module).values()]
    fields: dict[str, Any] = parts[0]
    if len(parts) > 1:
        fields = dict(zip(("vision_config", "text_config"), parts, strict=True))
    if model_type == "clip":
        fields["projection_dim"] = module.image.projection_dim
    config = transformers.CONFIG_MAPPING[model_type](
        **fields, architectures=[MODELS[model_type].architecture], dtype="float32"
    )
    return config.to_json_string()


def _fields_of(tower) -> dict[str, Any]:
    """Returns the fields of a config.json that state a tower's attributes."""
    layout = tower.layout
    fields = {field: getattr(tower, ours) for ours, field in layout.fields.items()}
    for name in layout.ratios:
        ratio, rest = divmod(getattr(tower, name), tower.width)
        if rest:
            raise UserError(
                f"{name} is {getattr(tower, name)}; a {type(tower).__name__} is saved with a "
                f"multiple of its width, {tower.width}, only"
            )
        fields[layout.fields[name]] = ratio
    return fields


def towers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the towers by the beginning of their parameters' paths."""
    if isinstance(module, DualEncoder):
        return {"image/": module.image, "text/": module.text}
    return {"": module}

"""The files of a model in Hugging Face's layout, from a local folder or the hub.

A folder holds `config.json` and `model.safetensors`, or several files of weights and
`model.safetensors.index.json`. Pickled weights are never opened.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import safetensors

from fne_jax import files
from fne_jax.errors import UserError, first_line

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def find_folder(
    path_or_hub_name: str | os.PathLike, revision: str | None, patterns: list[str]
) -> pathlib.Path:
    """Returns the local folder of a model, which the hub's client downloads where need be.

    On the hub it is of a branch, tag or commit, None for the newest, and of its files those of some
    glob patterns. Raises UserError if the name is neither a local folder nor a model that the hub
    gives.
    """
    path = pathlib.Path(files.expand_home(path_or_hub_name))
    if path.is_dir():
        return path
    name = str(path_or_hub_name)
    # Heavy, and needed for names only.
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:  # Of many unrelated classes: names, network, rights, the cache.
        raise UserError(
            f"{name!r} is neither a local folder nor a model that the Hugging Face hub gave "
            f"({first_line(error)}). Give a folder that holds {CONFIG} and {WEIGHTS}; where there "
            f"is no network, fetch it elsewhere with `hf download NAME --local-dir FOLDER`."
        ) from error
    return pathlib.Path(folder)


def read_config(folder: pathlib.Path) -> dict:
    """Returns what a folder's config.json holds; raises UserError if it is missing or damaged."""
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} holds no {CONFIG}; give the folder of a Hugging Face model")
    return read_json(path)


def read_json(path: pathlib.Path, kind: type = dict) -> Any:
    """Returns the content of a file of a model, a dict or what `kind` says.

    Raises UserError if the file is missing or damaged.
    """
    with files.as_user_error(f"{path} is damaged", "fetch it again", (OSError, ValueError)):
        content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, kind):
        name = "object" if kind is dict else "array"
        raise UserError(f"{path} is damaged (no JSON {name}); fetch it again")
    return content


def read_tensors(
    paths: list[pathlib.Path],
) -> Iterator[tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]]:
    """Yields every tensor of some files: its name, its shape, its dtype and how to read it.

    The dtype is named as safetensors does ("F32"); the last element is a function that returns the
    array. Raises UserError if a file is damaged.
    """
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


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the paths of the safetensors files in which a folder holds its weights.

    Raises UserError if there are none, one is missing, or there are only pickles.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        paths = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
        absent = [path.name for path in paths if not path.exists()]
        if absent or not paths:
            raise UserError(
                f"{folder / INDEX} names files that are not beside it: "
                f"{', '.join(absent) or 'none at all'}; fetch the model again"
            )
        return paths
    pickled = [name for name in _PICKLES if (folder / name).exists()]
    only = pickled and f", only {pickled[0]}, a pickle, which could run any code when opened"
    raise UserError(
        f"{folder} holds no {WEIGHTS}{only or ''}. Convert the weights to safetensors, e.g. by "
        "save_pretrained of transformers with PyTorch, or take a revision of the model that has "
        "them."
    )

"""The files of a model in Hugging Face's layout, or of a run, from a local folder or the hub.

A folder holds `config.json` and `model.safetensors`, or several files of weights and
`model.safetensors.index.json`. Pickled weights are never opened.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import safetensors

from fne_jax import files
from fne_jax.errors import EnvironmentFailure, UserError, first_line, is_environment_failure

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What of a run's folder its model is read from, and what was measured, by glob patterns.
RUN_FILES = ("config.json", "data.json", "eval_*.json", "tokenizer/*", "towers/*", "checkpoints/*")
REPOSITORY = r"[\w.-]+/[\w.-]+"
_TOO_MANY_REQUESTS = 429


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
    return _download(
        name, revision, patterns,
        f"{name!r} is neither a local folder nor a model that the Hugging Face hub gave",
        f"Give a folder that holds {CONFIG} and {WEIGHTS}; where there is no network, fetch it "
        "elsewhere with `hf download NAME --local-dir FOLDER`.",
    )  # fmt: skip


def run_folder(workdir: str | os.PathLike) -> pathlib.Path:
    """Returns the local folder of a run, downloading `hf://OWNER/NAME[@REVISION]` where need be.

    Raises UserError if the hub does not give it, or `~` stands for nobody's home.
    """
    address = os.fspath(workdir)
    if not address.startswith("hf://"):
        return pathlib.Path(files.expand_home(address))
    found = re.fullmatch(f"hf://({REPOSITORY})(?:@(.+))?", address)
    if not found:
        raise UserError(f"{address}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    where = f"{address} is no run that the Hugging Face hub gave"
    advice = "If it is private, log in by `hf auth login`."
    folder = _download(*found.groups(), RUN_FILES, where, advice)
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{address} is no run: it has no checkpoints")
    return folder


def _download(name, revision, patterns, where, advice):
    # Heavy, and needed for names only.
    import huggingface_hub

    with asking_hub(where, advice):
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[*patterns]
        )
    return pathlib.Path(folder)


@contextlib.contextmanager
def asking_hub(where: str, advice: str) -> Iterator[None]:
    """Turns errors of the hub's client in the block into a UserError, `where (answer). advice`.

    Raises EnvironmentFailure if there was no answer, or the server failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Of many unrelated classes: names, network, rights, the cache.
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        # By the module: the hub's client has changed the library by which it speaks HTTP.
        of_http = [one for one in causes if type(one).__module__.startswith("httpx")]
        told = next((one for one in causes if hasattr(one, "response")), (of_http or causes)[-1])
        said, failed = first_line(told), bool(of_http) or is_environment_failure(error)
        if (answer := getattr(told, "response", None)) is not None:
            url, code = str(answer.url).partition("?")[0], answer.status_code  # without a signature
            said = f"{code} {answer.reason_phrase} for {answer.request.method} {url}"
            said += f": {told.server_message}" if getattr(told, "server_message", "") else ""
            failed = code >= 500 or code == _TOO_MANY_REQUESTS
        kind = EnvironmentFailure if failed else UserError
        raise kind(f"{where} ({said}). {advice}") from error


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

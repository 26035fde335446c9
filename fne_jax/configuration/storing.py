"""A run's config.json: written beside it, and compared on resume."""

from __future__ import annotations

import json
import os
import pathlib

import ml_collections

from fne_jax.configuration.rules import FIELDS, flatten
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, write_atomically

FILE_NAME = "config.json"

# Fields that may change when a run resumes: none alters what the run computes, but for rounding
# and, with micro-batches, which units dropout drops.
MAY_CHANGE = (
    "checkpoint.",
    "compile_cache",
    "data.cache_dir",
    "data.dir",
    "data.max_skipped",
    "data.prefetch",
    "data.source",
    "data.test",
    "data.val",
    "encoder.attention",
    "encoder.remat",
    "evaluation.batch_size",
    "logging.",
    "max_bad_steps",
    "mesh.",
    "micro_batches",
)


def store_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json, or checks the one that is there.

    Raises UserError, listing the fields that differ from the stored run's and may not.
    """
    if (workdir / FILE_NAME).exists():
        check_stored(config, workdir)
    else:
        write_config(config, workdir)


def check_stored(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Checks that the run in a folder has a config, but for fields that may change.

    Raises UserError, listing the fields that differ, or that there is no config.
    """
    old = flatten(read_config(workdir))
    new = flatten(ml_collections.ConfigDict(json.loads(config.to_json())))
    different = [
        f"config.{name}: {old.get(name)!r} in the run, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(MAY_CHANGE)
    ]
    if different:
        raise UserError(
            f"{workdir} holds a run of another config:\n  "
            + "\n  ".join(different)
            + "\nGive the run's own values to resume it, or another --workdir to start a new run "
            f"(--config.init_from={workdir} starts from its weights)."
        )


def write_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json, over one that may be there; raises OSError if it cannot be written.

    The folder of the data is written whole, so that the run is read from any working directory.
    """
    content = json.loads(config.to_json())
    for field in ("dir", "cache_dir", "val", "test"):
        before, colon, path = content["data"][field].partition(":")
        if field in ("dir", "cache_dir"):
            before, colon, path = "", "", content["data"][field]
        # A dataset of TensorFlow Datasets may be given by its name.
        named = (before or content["data"]["source"]) == "tfds" and not os.path.exists(path)
        if path and not path.startswith("~") and "://" not in path and not named:
            content["data"][field] = before + colon + os.path.abspath(path)
    write_atomically(workdir / FILE_NAME, json.dumps(content, indent=2) + "\n")


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config stored with a run.

    Raises UserError if there is none, it is damaged, or its fields are those of another version.
    """
    path = workdir / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: {workdir} is not the workdir of a run")
    with as_user_error(f"{path}: not a JSON file", errors=(ValueError, TypeError)):
        config = ml_collections.ConfigDict({**json.loads(path.read_text())})
    fields = flatten(config).keys()
    differences = [
        f"{verb} {', '.join(f'config.{name}' for name in sorted(names))}"
        for verb, names in (("lacks", FIELDS.keys() - fields), ("also has", fields - FIELDS.keys()))
        if names
    ]
    if differences:
        raise UserError(
            f"{path} is the config of another version: it {' and '.join(differences)}; take the "
            "version of fne_jax that wrote it"
        )
    return config.lock()

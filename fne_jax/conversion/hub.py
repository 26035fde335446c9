"""Runs and exported folders, sent to the Hugging Face hub."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax.numpy as jnp

from fne_jax.conversion.export import SETTINGS
from fne_jax.encoders.freezing import TOWERS
from fne_jax.encoders.hub_files import RUN_FILES, asking_hub, read_json
from fne_jax.errors import UserError
from fne_jax.model import checkpoints
from fne_jax.model.model import abstract_fields, stored_model
from fne_jax.training.checkpointing import Checkpoints

# What `export` and the libraries whose files it writes call theirs.
_EXPORTED = (
    *("README.md", "image_text_encoder.*", "heads.safetensors", "*.stablehlo", "*.onnx*"),
    *("modules.json", "config_sentence_transformers.json", "config.json", "tokenizer*.json"),
    *("preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
# Of a repository, what a push leaves as it is.
_THEIRS = (".gitattributes", "README.md")


def files_to_push(
    folder: pathlib.Path, checkpoint: str | None, scratch: pathlib.Path
) -> dict[str, pathlib.Path]:
    """Returns the files that a push sends by their names in the repository.

    Of a run these are what `load_workdir` reads, with one checkpoint (None for the best) written
    into an empty folder without the optimizer's state, and its scores; nothing else leaves. Raises
    UserError if the folder is neither a run's nor what `export` wrote, or is damaged.
    """
    if (folder / SETTINGS).is_file():
        if checkpoint is not None:
            raise UserError(f"{folder} was exported, of one checkpoint; --checkpoint is of runs")
        places = [folder, *(folder / tower for tower in TOWERS)]
        found = (path for place in places for name in _EXPORTED for path in place.glob(name))
        return {path.relative_to(folder).as_posix(): path for path in sorted(found)}
    if not (folder / checkpoints.DIRECTORY).is_dir():
        raise UserError(
            f"--from={folder}: expected the folder of a run, with {checkpoints.DIRECTORY}, or one "
            f"that `convert export` wrote, with {SETTINGS}"
        )
    model = stored_model(folder)
    with checkpoints.reader(folder) as manager:
        step = checkpoints.find_step(manager, checkpoint or "best")
        fields, _ = checkpoints.read(manager, step, abstract_fields(model))
        metrics = manager.metrics(step)
    written = Checkpoints(scratch, model.config.checkpoint)
    written.save({"step": jnp.int32(step)} | fields, {}, metrics)
    written.finish()
    for path in (path for pattern in RUN_FILES[:-1] for path in folder.glob(pattern)):
        copy = scratch / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        if "verdicts" in (report := read_json(path) if path.match("eval_*.json") else {}):
            report["verdicts"].pop("reviewers", None)  # people's names
            copy.write_text(json.dumps(report, indent=2) + "\n")
    found = sorted(path for path in scratch.rglob("*") if path.is_file())
    return {path.relative_to(scratch).as_posix(): path for path in found}


def push(repository: str, files: dict[str, pathlib.Path], *, public: bool, replace: bool) -> str:
    """Sends files to OWNER/NAME on the hub, made if need be, as one commit; returns its address.

    With `replace` other files of the repository go. Raises UserError if it has files without that,
    or is not as public as asked, nobody is logged in, or the hub refuses or does not answer.
    """
    # Heavy, and needed here only.
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    api = huggingface_hub.HfApi()
    with asking_hub(
        f"pushing to {repository} failed",
        "It has all files of a push or none; `hf auth login` takes a token that may write there.",
    ):
        if huggingface_hub.get_token() is None:
            raise UserError(
                "nobody is logged in to the Hugging Face hub: run `hf auth login`, or set HF_TOKEN "
                "to a token that may write"
            )
        try:
            info = api.model_info(repository)
        except RepositoryNotFoundError:
            api.create_repo(repository, private=not public)
            info = api.model_info(repository)
        if info.private == public:
            kind, flag = ("private", "without") if public else ("public", "with")
            raise UserError(
                f"{repository} is there and {kind}: push {flag} --public, or change its settings"
            )
        there = [one.rfilename for one in info.siblings or [] if one.rfilename not in _THEIRS]
        if there and not replace:
            raise UserError(
                f"{repository} is there with {len(there):,} files, such as {there[0]}; give "
                "--replace to put these in place of them, or another name"
            )
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in there if name not in files]
        return api.create_commit(
            repository, operations, commit_message="Push by fne_jax", parent_commit=info.sha
        ).commit_url

"""The folder of a run: one live run at a time, one config, one dataset."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from fne_jax import configuration
from fne_jax.data.identity import FILE_NAME as IDENTITY_FILE
from fne_jax.data.identity import DatasetIdentity, read_identities
from fne_jax.data.pairs import SPLITS
from fne_jax.encoders import towers
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, locked, remove_leftovers, write_atomically
from fne_jax.model import checkpoints, tokenizers
from fne_jax.model.model import Model
from fne_jax.parallel import processes
from fne_jax.training.metric_log import FILE_NAME as METRICS_FILE

LOCK_FILE = "run.lock"
_PATTERNS = "[]*?\\"  # which Orbax takes for a pattern where it looks for what it wrote
# What a run names beside its splits.
_FILES = {"matches": "list of matches", "teacher": "teacher", "refuted": "list of refuted pairs"}


@contextlib.contextmanager
def errors_told(workdir: pathlib.Path) -> Iterator[None]:
    """Raises UserError for errors of the block on files in the folder that are not told yet."""
    try:
        yield
    except OSError as error:
        if not str(error.filename).startswith(str(workdir)):
            raise
        raise UserError(f"--workdir={workdir}: {error}; give the same command again") from error


def is_begun(workdir: pathlib.Path) -> bool:
    """Returns whether a run has a checkpoint in the folder, so that it is gone on with.

    The same on all processes. Without a checkpoint nothing can be lost: another config may take the
    folder over. Raises UserError if the folder cannot be read.
    """
    flag = f"--workdir={workdir}"
    with processes.failing_together(flag), as_user_error(f"{flag}: cannot be read"):
        begun = bool(checkpoints.stored_steps(workdir))
    return bool(processes.highest(begun))


def check_data(workdir: pathlib.Path, data: Mapping[str, DatasetIdentity]) -> None:
    """Checks that a run that is begun was trained and validated on this data.

    Raises UserError, naming the split that differs; also if the folder holds converted weights
    alone.
    """
    with processes.failing_together(f"--workdir={workdir}"):
        stored = read_identities(workdir)
        if not stored.keys() >= set(SPLITS):
            raise UserError(
                f"{workdir} holds weights, as `convert` writes them, and no run that could go on; "
                f"give another --workdir and --config.init_from={workdir} to begin with them"
            )
        for split, now in data.items():
            before = stored.get(split, now)
            if before != now and split != "test":  # of which whatever reads it tells
                named = _FILES.get(split, f"{split!r} split")
                raise UserError(
                    f"{workdir} holds a run on other data: its {named} had {before}; that of "
                    f"config.data has {now}. Give the run's own data to resume it, or another "
                    f"--workdir to start a new run (--config.init_from={workdir} starts from its "
                    "weights)."
                )


def begin(
    workdir: pathlib.Path,
    model: Model,
    architectures: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, DatasetIdentity],
    *,
    begun: bool = False,
) -> None:
    """Writes what restores a run's model; what another config left there is replaced.

    Only process 0 writes, to a folder that is held. Of a run that is begun, by what `is_begun`
    returned before, whatever already exists stays; what a killed writer left unfinished is removed.
    `architectures` is what `encoders.towers.read_architectures` returned; `data` has the identity
    of each split by name, and as `matches`, `teacher` and `refuted` those of these files, if known.

    Raises UserError if the folder cannot be written to, or is not shared by all processes.
    """
    if is_begun(workdir) != begun:
        raise UserError(f"{workdir} changed meanwhile; give the same command again")
    with processes.failing_together(f"--workdir={workdir}"):
        if jax.process_index() == 0:
            with as_user_error(f"--workdir={workdir}: cannot be written to"):
                _write(workdir, model, architectures, data, begun)
    with processes.failing_together(f"--workdir={workdir}"):
        if not (workdir / configuration.FILE_NAME).exists():
            raise UserError(
                f"--workdir={workdir}: process {jax.process_index()} does not find there what "
                "process 0 wrote; give a folder on a file system that all processes share"
            )


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps all other runs from a folder, which is created, while the block runs.

    A lock of the operating system on the file `run.lock`, which ends with the process however that
    ends, so none is ever left behind. It reaches over several hosts on NFS (version 4, or 3 with
    its lock daemon) and on Lustre mounted with `flock`; where a file system has no locks there is a
    warning, and where its locks end at the host (some mounts of buckets) other hosts do not see it.
    Raises UserError if another run holds the folder, or it cannot be written to or hold
    checkpoints.
    """
    path = str(workdir.absolute())
    if found := sorted(set(path) & set(_PATTERNS)):
        raise UserError(
            f"--workdir={workdir}: Orbax loses checkpoints there, for the {' '.join(found)} in "
            f"its path {path}; give another folder"
        )

    def refuse(holder):
        raise UserError(
            f"--workdir={workdir}: another run is training there ({holder}); wait for it, stop "
            "it, or give another --workdir"
        )

    with contextlib.ExitStack() as stack:
        with processes.failing_together(f"--workdir={workdir}"):
            if jax.process_index() == 0:
                with as_user_error(f"--workdir={workdir}: cannot be written to"):
                    workdir.mkdir(parents=True, exist_ok=True)
                lock = workdir / LOCK_FILE
                with as_user_error(f"{lock}: cannot be locked"):
                    stack.enter_context(locked(lock, refuse, "begin no second run in it"))
        yield


def _write(workdir, model, architectures, data, begun):
    stored = {split: dataclasses.asdict(identity) for split, identity in data.items()}
    stored = json.dumps(stored, indent=2) + "\n"
    # Others, such as a report, may be written by another command now.
    for name in (configuration.FILE_NAME, IDENTITY_FILE, METRICS_FILE, tokenizers.DIRECTORY):
        remove_leftovers(workdir / name)
    for tower in architectures:
        remove_leftovers(workdir / towers.DIRECTORY / f"{tower}.json")
    if begun:
        # Warm-ups do not know the matches and the teacher of what follows.
        if data.keys() - set(SPLITS):
            write_atomically(workdir / IDENTITY_FILE, stored)
        return
    towers.store_architectures(architectures, workdir)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(workdir / tokenizers.DIRECTORY)
    tokenizers.store_tokenizer(model.tokenizer, workdir)
    write_atomically(workdir / IDENTITY_FILE, stored)
    configuration.write_config(model.config, workdir)

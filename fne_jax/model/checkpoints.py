"""Checkpoints as every reader sees them: which steps there are, and the verified arrays of one.

A checkpoint is a folder `checkpoints/<step>` that Orbax writes: `state`, the fields of the train
state, and `position`, a JSON file with where the run was, the layout's number and a fingerprint of
each field.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fne_jax.errors import (
    EXIT_USER_ERROR,
    EnvironmentFailure,
    UserError,
    first_line,
)
from fne_jax.parallel import common_end, processes

DIRECTORY = "checkpoints"
BEST_METRIC = "rsum"
ITEMS = ("state", "position")
# Counts up with each change of what a checkpoint holds.
LAYOUT = 4
METRICS = "metrics"  # Orbax's name of the item and of the file within
# What reading meets in files that are damaged, or not there. Other errors of the operating system
# tell of the storage, which may give the same files another time.
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
)
# What TensorStore's ValueErrors begin with if the storage failed rather than what it holds.
_STORAGE_FAILED = (
    "ABORTED",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "UNKNOWN",
)
_DAMAGED = 1  # of what processes agree on, where other errors have their exit codes
_HOST_PART = 2**20  # elements whose checksum the host computes at once
_log = logging.getLogger(__name__)


class DamagedCheckpoint(UserError):
    """A checkpoint lacks a part, or is not what was written."""


def reader(workdir: pathlib.Path) -> ocp.CheckpointManager:
    """Returns a manager that leaves everything as it is, for runs that may be training.

    Each process reads by itself, so that an error of one leaves no other waiting.

    Raises:
      UserError: If the checkpoints cannot be listed.
    """
    folder = (workdir / DIRECTORY).absolute()
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics[BEST_METRIC],
        read_only=True,
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        ),
    )
    try:
        return ocp.CheckpointManager(folder, options=options, item_names=ITEMS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: the checkpoints cannot be listed: {first_line(error)}"
        ) from error


def unlisted(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """Yields the checkpoints whose metrics Orbax cannot parse, so that it lists none, and why.

    Raises:
      OSError: If metrics cannot be read.
    """
    for metrics in sorted(folder.glob(f"[0-9]*/{METRICS}/{METRICS}")):
        try:
            json.loads(metrics.read_text())[BEST_METRIC]
        except (ValueError, KeyError, TypeError) as error:
            yield metrics.parents[1], f"{metrics.parents[1]} is damaged: {metrics.name}: {error}"


def stored_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of a run's whole checkpoints in increasing order, damaged ones included.

    Raises:
      OSError: If the folder is there and cannot be read.
    """
    folder = workdir / DIRECTORY
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def find_step(manager: ocp.CheckpointManager, which: str) -> int:
    """Returns the step that a name stands for.

    Args:
      manager: A manager of the run's checkpoints.
      which: `best` (by validation rSum; the latest where none was validated), `latest`, or a
        number.

    Raises:
      UserError: if there is no such checkpoint.
    """
    steps = manager.all_steps()
    folder = manager.directory
    if not steps:
        raise UserError(f"{folder}: there is no checkpoint yet; train first, or check --workdir")
    if which == "latest":
        return manager.latest_step()
    if which == "best":
        best = manager.best_step()
        return manager.latest_step() if best is None else best
    if which.isdecimal() and int(which) in steps:
        return int(which)
    raise UserError(
        f"{folder}: there is no checkpoint {which!r}; "
        f"expected best, latest or one of {', '.join(map(str, steps))}"
    )


def read(
    manager: ocp.CheckpointManager, step: int, like: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns some fields of the train state saved at a step, and the position in the run.

    Args:
      manager: A manager of the run's checkpoints.
      step: One of its steps.
      like: The wanted fields by name, arrays or their abstract shapes. What is read takes their
        shapes, dtypes and shardings, whatever mesh it was saved from.

    Raises:
      DamagedCheckpoint: If a part is missing, or other than it was written, on any process.
      UserError: If it was written in another layout, or could not be read, on any process.
    """
    where = f"the checkpoint {manager.directory / str(step)}"
    fault = fields = None
    try:
        fields, position = _read_here(manager, step, like, where)
    except Exception as error:
        fault = error
    # What follows is computed by all processes together, or by none.
    worst = processes.highest(_severity(fault))
    if fault is not None and _severity(fault) == worst:
        raise fault
    if worst == _DAMAGED:
        raise DamagedCheckpoint(f"{where} is damaged; the log of another process tells why")
    if worst:
        message = f"{where} was not read; the log of another process tells why"
        raise common_end.FailedElsewhereError(message, worst)
    stored = position.get("fingerprints", {})
    for name, value in fingerprints(fields).items():
        if value != stored.get(name):
            raise DamagedCheckpoint(
                f"{where} is damaged: the arrays of {name!r} are not those that were saved"
            )
    return fields, position


def _severity(error):
    """Returns 0 without an error, 1 for damage, else an exit code, which is higher."""
    if isinstance(error, DamagedCheckpoint):
        return _DAMAGED
    if isinstance(error, UserError):
        return error.exit_code
    return 0 if error is None else EXIT_USER_ERROR


def _read_here(manager, step, like, where):
    """Returns what `read` does, without a word from other processes and not yet verified."""
    position = _read_item(manager, step, where, position=ocp.args.JsonRestore()).position
    if not isinstance(position, dict):
        raise DamagedCheckpoint(f"{where} is damaged: its position is no object")
    layout = position.get("layout")
    if layout != LAYOUT:
        raise UserError(
            f"{where} has layout {layout}; this fne_jax reads layout {LAYOUT}. Go on with the "
            f"fne_jax that wrote it ({position.get('fne_jax')}), or begin a new run in another "
            "--workdir."
        )
    stored = position.get("fingerprints", {})
    if "params" in stored and (absent := like.keys() - stored.keys()):
        raise UserError(
            f"{where} is to be read, not to be resumed: it holds no {', '.join(sorted(absent))}; "
            "begin a run in another --workdir with --config.init_from"
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
    restore = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    return _read_item(manager, step, where, state=restore).state, position


def fingerprints(fields: Mapping[str, Any]) -> dict[str, int]:
    """Returns a checksum of all bits of each field's arrays, the same on any mesh.

    Storage may lose or alter parts without an error: a chunk that is missing reads as zeros.
    """
    # One small program for each shape: one over all arrays takes many times as long to compile.
    sums = {
        name: [
            (_fingerprint_on_host if _on_host(leaf) else _fingerprint)(leaf, np.uint32(number))
            for number, leaf in enumerate(jax.tree.leaves(field))
        ]
        for name, field in fields.items()
    }
    return {name: sum(map(int, values)) % 2**32 for name, values in jax.device_get(sums).items()}


def _on_host(leaf):
    return leaf.is_fully_addressable and all(d.platform == "cpu" for d in leaf.sharding.device_set)


def _fingerprint_on_host(leaf, number):
    """Returns what `_fingerprint` does, without a program to be compiled."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    bits = np.asarray(leaf).reshape(-1).view(f"uint{8 * leaf.dtype.itemsize}")
    total, first = 0, int(number) * bits.size
    for start in range(0, bits.size, _HOST_PART):
        part = bits[start : start + _HOST_PART].astype(np.uint32)
        place = np.arange(len(part), dtype=np.uint32) + np.uint32((first + start) % 2**32)
        total += int((part * (2 * place + np.uint32(1))).sum(dtype=np.uint32))
    return total % 2**32


@jax.jit
def _fingerprint(leaf, number):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place = number
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # An odd factor for each place, so that exchanged values show.
    return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)


def _read_item(manager, step, where, **item):
    try:
        return _restored(manager, step, where, ocp.args.Composite(**item))
    except jax.errors.JaxRuntimeError:  # too little memory on a device, say
        raise
    except Exception as error:  # Orbax raises bare Exceptions for arrays that it cannot read
        if is_damage(error):
            raise DamagedCheckpoint(f"{where} is damaged: {first_line(error)}") from error
        kind = UserError if isinstance(error, PermissionError) else EnvironmentFailure
        raise kind(
            f"{where} could not be read: {first_line(error)}; nothing was changed. Give the same "
            "command again, or move that folder away to do without it."
        ) from error


def _restored(manager, step, where, args):
    """Returns what Orbax restores; what seems to be damaged is read twice.

    Orbax takes a file for missing if the storage fails when asked whether it is there.
    """
    try:
        return manager.restore(step, args=args)
    except Exception as error:
        if not is_damage(error):
            raise
        _open_all(manager.directory / str(step))
        _log.warning("%s seems to be damaged: %s; it is read again", where, first_line(error))
        return manager.restore(step, args=args)


def _open_all(folder):
    """Raises OSError if a folder cannot be listed or a file in it not be opened."""

    def refuse(error):
        raise error

    for parent, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            open(os.path.join(parent, name), "rb").close()


def is_damage(error: BaseException) -> bool:
    """Returns whether an error of reading tells of what is stored, and not of the storage."""
    chain = list(_causes(error))
    failed = any(
        (isinstance(cause, OSError | MemoryError) and not isinstance(cause, _DAMAGE))
        or str(cause).startswith(_STORAGE_FAILED)
        for cause in chain
    )
    return not failed and any(isinstance(cause, _DAMAGE) for cause in chain)


def _causes(error):
    """Yields an error and what it came from, from the last to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

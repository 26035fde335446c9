"""Checkpoints as every reader sees them: which steps there are, and the verified arrays of one.

A checkpoint is a folder `checkpoints/<step>` that Orbax writes: `state`, the fields of the train
state, and `position`, a JSON file with where the run was, the layout's number and a fingerprint of
each field.
"""

from __future__ import annotations

import importlib.metadata
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from fne_jax.errors import UserError

DIRECTORY = "checkpoints"
BEST_METRIC = "rsum"
ITEMS = ("state", "position")
# Counts up with each change of what a checkpoint holds. 2 had one fingerprint over all fields, 1
# neither version nor fingerprint.
LAYOUT = 3
READABLE_LAYOUTS = (2, 3)
_log = logging.getLogger(__name__)


class DamagedCheckpoint(UserError):
    """A checkpoint cannot be read, or is not what was written."""


def reader(workdir: pathlib.Path) -> ocp.CheckpointManager:
    """Returns a manager that leaves everything as it is, for runs that may be training.

    Args:
      workdir: The folder of the run.
    """
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics[BEST_METRIC], read_only=True, create=False
    )
    folder = (workdir / DIRECTORY).absolute()
    return ocp.CheckpointManager(folder, options=options, item_names=ITEMS)


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
    if which.isdigit() and int(which) in steps:
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
      DamagedCheckpoint: if a part is missing, unreadable or other than it was written.
      UserError: if it was written in another layout, or reading is not permitted.
    """
    where = f"the checkpoint {manager.directory / str(step)}"
    position = _read_item(manager, step, where, position=ocp.args.JsonRestore()).position
    layout = position.get("layout", 1)
    if layout not in READABLE_LAYOUTS:
        writer = position.get("fne_jax", "an early version")
        raise UserError(
            f"{where} has layout {layout}, written by fne_jax {writer}; this is fne_jax "
            f"{importlib.metadata.version('fne-jax')}, which reads layout {LAYOUT}. Go on with the "
            "fne_jax that wrote it, or begin a new run in another --workdir."
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
    restore = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    fields = _read_item(manager, step, where, state=restore).state
    if layout < LAYOUT:
        _log.warning("%s has the older layout %d: its arrays are not verified", where, layout)
        return fields, position
    for name, value in fingerprints(fields).items():
        if value != position["fingerprints"].get(name):
            raise DamagedCheckpoint(
                f"{where} is damaged: the arrays of {name!r} are not those that were saved"
            )
    return fields, position


def fingerprints(fields: Mapping[str, Any]) -> dict[str, int]:
    """Returns a checksum of all bits of each field's arrays, the same on any mesh.

    Storage may lose or alter parts without an error: a chunk that is missing reads as zeros.
    """
    # One small program for each shape: one over all arrays takes many times as long to compile.
    sums = {
        name: [
            _fingerprint(leaf, jnp.uint32(number))
            for number, leaf in enumerate(jax.tree.leaves(field))
        ]
        for name, field in fields.items()
    }
    return {name: sum(map(int, values)) % 2**32 for name, values in jax.device_get(sums).items()}


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
        return manager.restore(step, args=ocp.args.Composite(**item))
    except PermissionError as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    except jax.errors.JaxRuntimeError:  # too little memory on a device, say: no damage
        raise
    except Exception as error:  # Orbax raises bare Exceptions for arrays that it cannot read
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpoint(f"{where} is damaged: {reason}") from error

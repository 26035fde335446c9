"""Orbax checkpoints of the whole train state and the position in the run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from fne_jax.errors import UserError
from fne_jax.parallel import processes

DIRECTORY = "checkpoints"
DAMAGED_DIRECTORY = "damaged_checkpoints"
BEST_METRIC = "rsum"
# Counts up with each change of what a checkpoint holds. 1 had neither version nor fingerprint.
LAYOUT = 2
_METRICS = "metrics"  # Orbax's name of the item and of the file within
_log = logging.getLogger(__name__)


class DamagedCheckpoint(UserError):
    """A checkpoint cannot be read, or is not what was written."""


def checkpoint_manager(
    workdir: pathlib.Path, settings: ml_collections.ConfigDict, *, read_only: bool = False
) -> ocp.CheckpointManager:
    """Returns the manager of a run's checkpoints: the newest few and the best by validation rSum.

    What a killed save left behind is removed, and what Orbax could not even list set aside.

    Args:
      workdir: the run's folder.
      settings: `config.checkpoint`.
      read_only: leaves everything as it is; for readers of a run that may be training.

    Raises:
      UserError: if there is a file in the folder's place.
    """
    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(settings.keep_latest),
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[BEST_METRIC],
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
    )
    folder = (workdir / DIRECTORY).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder; move it away to resume or begin the run")
    if not read_only:
        with processes.first_process_first("unlisted checkpoints"):
            _set_aside_unlisted(folder)
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics[BEST_METRIC],
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        ),
        item_names=("state", "position"),
    )


def save(
    manager: ocp.CheckpointManager,
    state: Any,
    position: dict[str, Any],
    metrics: dict[str, float] | None = None,
) -> None:
    """Begins to write the state and the JSON-able position under the state's step.

    A checkpoint that is already there is left alone: the same step means the same state.

    Raises:
      UserError: if this or the save before failed; the checkpoints before are intact.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    about = {
        "layout": LAYOUT,
        "fne_jax": importlib.metadata.version("fne-jax"),
        "fingerprint": fingerprint(state),
    }
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position | about)
    )
    with _refusing(manager):
        manager.save(step, args=items, metrics=metrics)


def check(manager: ocp.CheckpointManager) -> None:
    """Raises UserError if what is being saved in the background could not be written."""
    with _refusing(manager):
        manager.check_for_errors()


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until what was saved is on disk, for all processes, and closes the manager.

    Raises:
      UserError: if it could not be written; the checkpoints before are intact.
    """
    with _refusing(manager):
        manager.close()
    # Whoever starts processes may end all of them when the first has gone.
    processes.barrier("checkpoints are written")


def add_metrics(manager: ocp.CheckpointManager, step: int, metrics: dict[str, float]) -> None:
    """Adds the validation of a checkpoint that was saved before it was validated."""
    item = ocp.Checkpointer(ocp.JsonCheckpointHandler(filename=_METRICS))
    item.save(manager.directory / str(step) / _METRICS, metrics)
    item.close()
    manager.reload()


def restore(manager: ocp.CheckpointManager, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the state and position saved at a step.

    Args:
      manager: of the run.
      step: one of its steps.
      like: a state whose shapes, dtypes and shardings the restored one takes, whatever mesh it
        was saved from.

    Raises:
      DamagedCheckpoint: if a part is missing, unreadable or other than it was written.
      UserError: if it was written in another layout, or reading is not permitted.
    """
    where = f"the checkpoint {manager.directory / str(step)}"
    position = _read(manager, step, where, position=ocp.args.JsonRestore()).position
    layout = position.get("layout", 1)
    if layout != LAYOUT:
        writer = position.get("fne_jax", "an early version")
        raise UserError(
            f"{where} has layout {layout}, written by fne_jax {writer}; this is fne_jax "
            f"{importlib.metadata.version('fne-jax')}, which reads layout {LAYOUT}. Go on with the "
            "fne_jax that wrote it, or begin a new run in another --workdir."
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    state = _read(manager, step, where, state=ocp.args.StandardRestore(abstract)).state
    if fingerprint(state) != position["fingerprint"]:
        raise DamagedCheckpoint(f"{where} is damaged: its arrays are not those that were saved")
    return state, position


def restore_newest(
    manager: ocp.CheckpointManager, like: Any
) -> tuple[int, Any, dict[str, Any]] | None:
    """Returns step, state and position of the newest whole checkpoint, or None without any.

    Damaged ones are moved to the folder `damaged_checkpoints` beside, with a warning.

    Args:
      manager: of the run; not read-only.
      like: see `restore`.
    """
    while (step := manager.latest_step()) is not None:
        damage = None
        try:
            state, position = restore(manager, step, like)
        except DamagedCheckpoint as error:
            damage = error
        if processes.all_agree(damage is None):
            return step, state, position
        with processes.first_process_first(f"damaged {step}"):
            _set_aside(pathlib.Path(manager.directory) / str(step), damage)
        manager.reload()
    return None


def find_step(manager: ocp.CheckpointManager, which: str) -> int:
    """Returns the step that `best`, `latest` or a number names.

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


@jax.jit
def _fingerprint(leaves):
    total = jnp.uint32(0)
    for number, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        # An odd factor for each place, so that exchanged values show.
        place = jnp.uint32(number)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, bits.shape, axis
            )
        total += (bits * (2 * place + 1)).sum(dtype=jnp.uint32)
    return total


def fingerprint(state: Any) -> int:
    """Returns a checksum of all bits of a state's arrays, the same on any mesh.

    Storage may lose or alter parts without an error: a chunk that is missing reads as zeros.
    """
    return int(_fingerprint(jax.tree.leaves(state)))


def _read(manager, step, where, **items):
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except PermissionError as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    except jax.errors.JaxRuntimeError:  # too little memory on a device, say: no damage
        raise
    except Exception as error:  # Orbax raises bare Exceptions for arrays that it cannot read
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpoint(f"{where} is damaged: {reason}") from error


@contextlib.contextmanager
def _refusing(manager):
    """Raises UserError for what goes wrong in writing."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        names = (path.name for path in pathlib.Path(manager.directory).glob("*"))
        steps = sorted(int(name) for name in names if name.isdigit())
        last = f"the last good one is of step {steps[-1]}" if steps else "there is none before it"
        raise UserError(
            f"{manager.directory}: a checkpoint could not be written: {reason}; {last}. Make room "
            "or mend the permissions, and give the same command again."
        ) from error


def _set_aside(checkpoint, reason):
    if not checkpoint.exists():  # another process was here
        return
    folder = checkpoint.parent.with_name(DAMAGED_DIRECTORY)
    folder.mkdir(exist_ok=True)
    number = sum(path.name.startswith(f"{checkpoint.name}-") for path in folder.iterdir())
    target = folder / f"{checkpoint.name}-{number}"
    checkpoint.rename(target)
    _log.warning("%s; set aside as %s", reason or f"{checkpoint} is damaged elsewhere", target)


def _set_aside_unlisted(folder):
    """Sets aside steps whose metrics Orbax cannot parse, over which it would stumble at once."""
    for metrics in folder.glob(f"[0-9]*/{_METRICS}/{_METRICS}"):
        checkpoint = metrics.parents[1]
        try:
            json.loads(metrics.read_text())[BEST_METRIC]
        except (ValueError, KeyError, TypeError) as error:
            _set_aside(checkpoint, f"the checkpoint {checkpoint} is damaged: {metrics}: {error}")

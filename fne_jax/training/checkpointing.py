"""Orbax checkpoints of the whole train state and the position in the run."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from fne_jax.errors import UserError

DIRECTORY = "checkpoints"
BEST_METRIC = "rsum"


def checkpoint_manager(
    workdir: pathlib.Path, settings: ml_collections.ConfigDict
) -> ocp.CheckpointManager:
    """Returns the manager of a run's checkpoints: the newest few and the best by validation rSum.

    Args:
      workdir: the run's folder.
      settings: `config.checkpoint`.
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
    return ocp.CheckpointManager(
        (workdir / DIRECTORY).absolute(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics[BEST_METRIC],
            enable_async_checkpointing=True,
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
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
        ),
        metrics=metrics,
    )


def restore(manager: ocp.CheckpointManager, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the state and position saved at a step.

    Args:
      manager: of the run.
      step: one of its steps.
      like: a state whose shapes, dtypes and shardings the restored one takes, whatever mesh it
        was saved from.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
        ),
    )
    return restored.state, restored.position


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

"""Writing a run's checkpoints: the whole train state and the position in the run.

`fne_jax.model.checkpoints` tells what a checkpoint holds and reads it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import pathlib
from typing import Any

import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from fne_jax.errors import EnvironmentFailure, UserError
from fne_jax.model import checkpoints
from fne_jax.model.checkpoints import BEST_METRIC, DIRECTORY, ITEMS, LAYOUT, DamagedCheckpoint
from fne_jax.parallel import processes
from fne_jax.training.train_state import TrainState

DAMAGED_DIRECTORY = "damaged_checkpoints"
_METRICS = "metrics"  # Orbax's name of the item and of the file within
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run: the newest few and the best by validation rSum.

    What a killed save left behind is removed at the start, and what Orbax could not even list is
    set aside.

    Args:
      workdir: The folder of the run.
      settings: `config.checkpoint`.

    Attributes:
      folder: Where the checkpoints lie.

    Raises:
      UserError: if there is a file in the folder's place.
    """

    def __init__(self, workdir: pathlib.Path, settings: ml_collections.ConfigDict):
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
        self.folder = (workdir / DIRECTORY).absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; move it away to resume or begin the run")
        with processes.first_process_first("unlisted checkpoints"):
            _set_aside_unlisted(self.folder)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=lambda metrics: metrics[BEST_METRIC],
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                create=True,
            ),
            item_names=ITEMS,
        )

    def restore_newest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns state and position of the newest undamaged checkpoint, or None without any.

        Damaged ones are moved to the folder `damaged_checkpoints` beside, with a warning.

        Args:
          like: A state, concrete or abstract, whose shapes, dtypes and shardings the restored one
            takes.
        """
        while (step := self._manager.latest_step()) is not None:
            damage = None
            try:
                fields, position = checkpoints.read(self._manager, step, like.stored())
            except DamagedCheckpoint as error:
                damage = error
            if processes.all_agree(damage is None):
                return like.replace(**fields), position
            with processes.first_process_first(f"damaged {step}"):
                _set_aside(self.folder / str(step), damage)
            self._manager.reload()
        return None

    def is_validated(self, step: int) -> bool:
        """Returns whether the checkpoint of a step has the metrics of its validation."""
        return self._manager.metrics(step) is not None

    def save(
        self,
        state: TrainState,
        position: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Begins to write the state and the JSON-able position under the state's step.

        A checkpoint that is already there is left alone: the same step means the same state.

        Raises:
          EnvironmentFailure: if this or the save before failed; the checkpoints before are intact.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        fields = state.stored()
        about = {
            "layout": LAYOUT,
            "fne_jax": importlib.metadata.version("fne-jax"),
            "fingerprints": checkpoints.fingerprints(fields),
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(fields), position=ocp.args.JsonSave(position | about)
        )
        with self._refusing():
            self._manager.save(step, args=items, metrics=metrics)

    def check(self) -> None:
        """Raises EnvironmentFailure if what is saved in the background could not be written."""
        with self._refusing():
            self._manager.check_for_errors()

    def finish(self) -> None:
        """Waits until what was saved is on disk, for all processes, and closes the folder.

        Raises:
          EnvironmentFailure: if it could not be written; the checkpoints before are intact.
        """
        with self._refusing():
            self._manager.close()
        # Whoever starts processes may end all of them when the first has gone.
        processes.barrier("checkpoints are written")

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the validation of a checkpoint that was saved before it was validated."""
        item = ocp.Checkpointer(ocp.JsonCheckpointHandler(filename=_METRICS))
        item.save(self.folder / str(step) / _METRICS, metrics)
        item.close()
        self._manager.reload()

    @contextlib.contextmanager
    def _refusing(self):
        """Raises EnvironmentFailure for what goes wrong in writing."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            steps = sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())
            last = f"the last good one is of step {steps[-1]}" if steps else "there is none before"
            raise EnvironmentFailure(
                f"{self.folder}: a checkpoint could not be written: {reason}; {last}. Make room "
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

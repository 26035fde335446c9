"""Writing a run's checkpoints: the whole train state and the position in the run.

`fne_jax.model.checkpoints` tells what a checkpoint holds and reads it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import pathlib
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from fne_jax.errors import EnvironmentFailure, UserError, first_line
from fne_jax.model import checkpoints
from fne_jax.model.checkpoints import BEST_METRIC, DIRECTORY, LAYOUT, METRICS, DamagedCheckpoint
from fne_jax.parallel import processes
from fne_jax.training.train_state import TrainState

DAMAGED_DIRECTORY = "damaged_checkpoints"
_INDEX = "manifest.ocdbt"  # as TensorStore names it
_log = logging.getLogger(__name__)


class _StateHandler(ocp.PyTreeCheckpointHandler):
    """Writes what Orbax does, or fails.

    Each process writes a folder of its own, and process 0 one index over those that it finds: where
    the storage fails as they are listed, Orbax finds none, and takes the checkpoint for whole.
    """

    def finalize(self, directory):
        super().finalize(directory)
        (directory / _INDEX).stat()

    @classmethod
    def typestr(cls):
        return ocp.PyTreeCheckpointHandler.typestr()  # which reads it


class Checkpoints:
    """The checkpoints of a run: the newest few and the best by validation rSum.

    What a killed save left behind is removed at the start. Damaged checkpoints are set aside: moved
    to the folder `damaged_checkpoints` beside, with a warning, if others remain. Raises UserError
    if there is a file in the place of `folder`, where they lie, all are damaged, or it cannot be
    read or written.
    """

    def __init__(self, workdir: pathlib.Path, settings: ml_collections.ConfigDict):
        self._workdir = workdir
        self.folder = (workdir / DIRECTORY).absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(
                f"{self.folder} is not a folder; move it away to resume or begin the run"
            )
        with processes.failing_together("the checkpoints"), self._refusing():
            if jax.process_index() == 0:
                self._set_aside(dict(checkpoints.unlisted(self.folder)))
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
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, _StateHandler())
        with self._refusing():
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy,
                    best_fn=lambda metrics: metrics[BEST_METRIC],
                    enable_async_checkpointing=True,
                    # Else, after an error, threads wait for folders that nobody will create, and
                    # the process does not end.
                    async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
                    cleanup_tmp_directories=True,
                    create=True,
                ),
                handler_registry=handlers,
            )

    def restore_newest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns state and position of the newest undamaged checkpoint.

        The state has the shapes, dtypes and shardings of `like`, concrete or abstract. Raises
        UserError if a checkpoint could not be read, all are damaged (they stay where they are), or
        there is none.
        """
        damaged, fields = {}, None
        with checkpoints.reader(self._workdir) as manager:
            steps = set(manager.all_steps())
            # The same on all processes, should one see less of the folder.
            while fields is None and (step := processes.highest(max(steps, default=-1))) >= 0:
                steps.discard(step)
                try:
                    fields, position = checkpoints.read(manager, step, like.stored())
                except DamagedCheckpoint as error:
                    damaged[self.folder / str(step)] = error
        with processes.failing_together("the damaged checkpoints"), self._refusing():
            if jax.process_index() == 0:
                self._set_aside(damaged)
        if fields is None:
            raise UserError(f"{self.folder}: there is no whole checkpoint")
        if damaged:
            self._manager.reload()
        return like.replace(**fields), position

    def is_validated(self, step: int) -> bool:
        """Returns whether the checkpoint of a step has the metrics of its validation."""
        with self._refusing():
            return self._manager.metrics(step) is not None

    def save(
        self,
        fields: dict[str, Any],
        position: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Begins to write fields of a state and the JSON-able position under the field `step`.

        A checkpoint that is already there is left alone, as the same step means the same state, but
        for the metrics of a validation that comes after it was saved. Raises EnvironmentFailure if
        this or the save before failed; the checkpoints before are intact.
        """
        step = int(fields["step"])
        if step in self._manager.all_steps():
            if metrics is not None:
                with self._refusing():
                    item = ocp.Checkpointer(ocp.JsonCheckpointHandler(filename=METRICS))
                    item.save(self.folder / str(step) / METRICS, metrics)
                    item.close()
                    self._manager.reload()
            return
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

        Raises EnvironmentFailure if it could not be written; the checkpoints before are intact.
        """
        with self._refusing():
            self._manager.close()
        # Whoever starts processes may end all of them when the first has gone.
        processes.barrier("checkpoints are written")

    @contextlib.contextmanager
    def _refusing(self):
        """Raises EnvironmentFailure for what goes wrong in the folder."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = first_line(error)
            with contextlib.suppress(OSError):
                steps = checkpoints.stored_steps(self._workdir)
                last = f"the last good one is of step {steps[-1]}" if steps else "there is none yet"
                reason += f"; {last}"
            raise EnvironmentFailure(
                f"{self.folder}: a checkpoint could not be written: {reason}. Make room "
                "or mend the permissions, and give the same command again."
            ) from error

    def _set_aside(self, damaged):
        """Moves damaged checkpoints away, given with the reasons, unless there are no others."""
        if not damaged:
            return
        if len(damaged) == len(checkpoints.stored_steps(self._workdir)):
            reasons = "; ".join(map(str, damaged.values()))
            raise UserError(
                f"{self.folder}: no checkpoint is undamaged: {reasons}; nothing was changed. "
                "Restore the folder from a copy, or move it away to start the run again."
            )
        folder = self.folder.with_name(DAMAGED_DIRECTORY)
        folder.mkdir(exist_ok=True)
        for checkpoint, reason in damaged.items():
            number = sum(path.name.startswith(f"{checkpoint.name}-") for path in folder.iterdir())
            target = folder / f"{checkpoint.name}-{number}"
            checkpoint.rename(target)
            _log.warning("%s; set aside as %s", reason, target)

"""Weights & Biases, which gets a run's scalars beside TensorBoard: `config.logging.wandb`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import uuid
from collections.abc import Mapping

import jax
import ml_collections

from fne_jax.configuration import flatten
from fne_jax.errors import UserError, install_command
from fne_jax.files import as_user_error, write_atomically

FILE_NAME = "wandb.json"
_log = logging.getLogger(__name__)


def check_installed(settings: ml_collections.ConfigDict) -> None:
    """Raises UserError if `config.logging` wants W&B, and it is not installed."""
    found = importlib.util.find_spec("wandb")
    # A folder of that name, as W&B leaves behind, is no package.
    if settings.wandb and (found is None or found.origin is None):
        raise UserError(
            f"config.logging.wandb is True, but wandb is not installed: {install_command('wandb')}"
        )


class WandbLog:
    """A remote run, on process 0 and if `config.logging.wandb` says so; else nothing.

    A run that resumes goes on with the remote run whose id its workdir holds; one that begins at
    step 0 begins another. What fails there does not end the training: it is told once, and nothing
    more is written.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path, resumed_step: int):
        self._run = None
        if not config.logging.wandb or jax.process_index() != 0:
            return
        label = f"{workdir.resolve().name}-{_run_id(workdir, resumed_step)}"
        with self._failing_alone():
            import wandb

            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fne-jax"),
                # Where W&B takes ids, these are refused: / \ # ? % :
                id=re.sub(r"[/\\#?%:]", "-", label),
                name=label,
                dir=str(workdir),
                config={
                    field: list(value) if isinstance(value, tuple) else value
                    for field, value in flatten(config).items()
                },
                resume="allow",
                reinit="finish_previous",
            )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars under a step."""
        if self._run is not None:
            with self._failing_alone():
                self._run.log({key: float(value) for key, value in scalars.items()}, step=step)

    def close(self) -> None:
        """Ends this part of the remote run, with everything sent."""
        if self._run is not None:
            with self._failing_alone():
                self._run.finish()
        self._run = None

    @contextlib.contextmanager
    def _failing_alone(self):
        """Warns of an error of the block, after which nothing more is written."""
        try:
            yield
        except Exception as error:
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            _log.warning(
                "wandb: %s; nothing more is written there, and the training goes on", reason
            )


def _run_id(workdir, resumed_step):
    path = workdir / FILE_NAME
    if resumed_step and path.exists():
        advice = "remove it to go on with another remote run"
        with as_user_error(f"{path}: cannot be read", advice, (ValueError, TypeError, KeyError)):
            return str(json.loads(path.read_text())["run_id"])
    run_id = uuid.uuid4().hex[:8]
    write_atomically(path, json.dumps({"run_id": run_id}) + "\n")
    return run_id

"""Services of experiment tracking that also get a run's scalars, `config.logging.also`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from fne_jax.configuration import flatten
from fne_jax.errors import UserError
from fne_jax.files import write_atomically

FILE_NAME = "trackers.json"
PROJECT = "fne-jax"
# How to install each; no version of trackio goes with a Pillow of 13 or newer, hence no extra.
_INSTALL = {"wandb": "pip install 'fne-jax[wandb]'", "trackio": "pip install trackio"}
_log = logging.getLogger(__name__)


def check_installed(names: Sequence[str]) -> None:
    """Checks that a run can write to trackers, before it writes anything.

    Raises:
      UserError: naming the package that is not installed.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise UserError(
                f"config.logging.also names {name}, which is not installed: {_INSTALL[name]}"
            )


def open_trackers(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, resumed_step: int
) -> list[Tracker]:
    """Returns each of `config.logging.also`, on process 0; none on others.

    A run that resumes goes on with the remote run whose id its workdir holds; one that begins at
    step 0 begins another.

    Args:
      config: The resolved config, which the remote run shows.
      workdir: The folder of the run.
      resumed_step: The step that the run resumes from, or 0.
    """
    names = tuple(config.logging.also)
    if not names or jax.process_index() != 0:
        return []
    label = f"{workdir.resolve().name}-{_run_id(workdir, resumed_step)}"
    return [Tracker(name, label, workdir, config) for name in names]


class Tracker:
    """A run of a tracker, which gets scalars.

    What fails there does not end the training: it is told once, and nothing more is written.

    Args:
      name: The tracker, one of that `config.logging.also` may name.
      label: The name of the remote run; it is gone on with where it exists.
      workdir: The folder of the run, for what the tracker keeps locally.
      config: The resolved config, which the remote run shows.
    """

    def __init__(
        self, name: str, label: str, workdir: pathlib.Path, config: ml_collections.ConfigDict
    ):
        self._name, self._run = name, None
        fields = {
            field: list(value) if isinstance(value, tuple) else value
            for field, value in flatten(config).items()
        }
        with self._failing_alone():
            self._run = _OPEN[name](importlib.import_module(name), label, workdir, fields)

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
            _log.warning(
                "%s: %s; nothing more is written there, and the training goes on",
                self._name,
                " ".join(str(error).split()) or type(error).__name__,
            )


def _wandb(module, label, workdir, config):
    return module.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        # Where W&B takes ids, these are refused: / \ # ? % :
        id=re.sub(r"[/\\#?%:]", "-", label),
        name=label,
        dir=str(workdir),
        config=config,
        resume="allow",
        reinit="finish_previous",
    )


def _trackio(module, label, workdir, config):
    del workdir  # it has a folder of its own for all runs
    return module.init(project=PROJECT, name=label, config=config, resume="allow", embed=False)


_OPEN: Mapping[str, Callable[..., Any]] = {"wandb": _wandb, "trackio": _trackio}


def _run_id(workdir, resumed_step):
    path = workdir / FILE_NAME
    if resumed_step and path.exists():
        try:
            return str(json.loads(path.read_text())["run_id"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: cannot be read: {error}; remove it to go on with another remote run"
            ) from error
    run_id = uuid.uuid4().hex[:8]
    write_atomically(path, json.dumps({"run_id": run_id}) + "\n")
    return run_id

"""Which services of experiment tracking also get a run's scalars, `config.logging.also`."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import ml_collections

from fne_jax.errors import UserError
from fne_jax.files import write_atomically

if TYPE_CHECKING:
    from clu.metric_writers import MetricWriter

FILE_NAME = "trackers.json"
# How to install each; no version of trackio goes with a Pillow of 13 or newer, hence no extra.
_INSTALL = {"wandb": "pip install 'fne-jax[wandb]'", "trackio": "pip install trackio"}


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
    if names and importlib.util.find_spec("clu") is None:
        raise UserError("config.logging.also takes clu, which is not installed: pip install clu")


def open_trackers(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, resumed_step: int
) -> list[MetricWriter]:
    """Returns a writer for each of `config.logging.also`, on process 0; none on others.

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
    # clu, and TensorFlow with it, are behind it.
    from fne_jax.training.tracker_writer import TrackerWriter

    label = f"{workdir.resolve().name}-{_run_id(workdir, resumed_step)}"
    return [TrackerWriter(name, label, workdir, config) for name in names]


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

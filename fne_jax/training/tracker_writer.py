"""clu's MetricWriter for services of experiment tracking."""

from __future__ import annotations

import importlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from clu.metric_writers import MetricWriter

from fne_jax.configuration import flatten

PROJECT = "fne-jax"
_log = logging.getLogger(__name__)


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


class TrackerWriter(MetricWriter):
    """Writes scalars, and nothing else, to a run of a tracker.

    What fails there does not end the training: it is told once, and nothing more is written.

    Args:
      name: The tracker, one that `config.logging.also` may name.
      label: The name of the remote run; it is gone on with where it exists.
      workdir: The folder of the run, for what the tracker keeps locally.
      config: The resolved config, which the remote run shows.
    """

    def __init__(
        self, name: str, label: str, workdir: pathlib.Path, config: ml_collections.ConfigDict
    ):
        self._name, self._run = name, None
        fields = {field: _plain(value) for field, value in flatten(config).items()}
        with _Told(self):
            self._run = _OPEN[name](importlib.import_module(name), label, workdir, fields)

    def write_scalars(self, step, scalars):
        """Writes scalars under a step."""
        if self._run is not None:
            with _Told(self):
                self._run.log({key: float(value) for key, value in scalars.items()}, step=step)

    def close(self):
        """Ends this part of the remote run, with everything sent."""
        if self._run is not None:
            with _Told(self):
                self._run.finish()
        self._run = None

    def flush(self):
        """Does nothing: trackers send in the background, and `close` waits for it."""

    def write_summaries(self, step, values, metadata=None):
        """Does nothing."""

    def write_images(self, step, images):
        """Does nothing."""

    def write_videos(self, step, videos):
        """Does nothing."""

    def write_audios(self, step, audios, *, sample_rate):
        """Does nothing."""

    def write_texts(self, step, texts):
        """Does nothing."""

    def write_histograms(self, step, arrays, num_buckets=None):
        """Does nothing."""

    def write_hparams(self, hparams):
        """Does nothing: the config is given when the run is opened."""

    def give_up(self, error: Exception) -> None:
        """Warns of an error, after which nothing more is written."""
        self._run = None
        _log.warning(
            "%s: %s; nothing more is written there, and the training goes on",
            self._name,
            " ".join(str(error).split()) or type(error).__name__,
        )


class _Told:
    """Lets no Exception out of the block: the writer tells it and gives up."""

    def __init__(self, writer):
        self._writer = writer

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            self._writer.give_up(error)
            return True
        return False


def _plain(value):
    return list(value) if isinstance(value, tuple) else value

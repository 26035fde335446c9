"""What a run writes down: metrics.jsonl, and the same for TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from fne_jax.errors import first_line
from fne_jax.files import as_user_error, write_atomically
from fne_jax.training.wandb_log import WandbLog

FILE_NAME = "metrics.jsonl"
EVALUATED = "eval_"  # begins the names of what a validation measured
# TensorBoard's groups of what is logged; all else is the group `train`.
_GROUPS = {
    "statistics": (
        *("positive_mean", "positive_std", "positive_count"),
        *("negative_mean", "negative_std", "negative_count"),
        *("similarity_distributions", "sampling_weights"),
    ),
    "negatives": (
        *("fallback_fraction", "sampled_posterior", "hinge_active"),
        *("sampled_false_negative_rate", "hardest_false_negative_rate"),
        *("queue_filled", "queue_age_steps"),
    ),
    "system": ("pairs_per_s", "data_wait_share"),
    "validation": ("similarity_positive", "similarity_negative"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_log = logging.getLogger(__name__)


def tensorboard_tag(name: str) -> str:
    """Returns the tag of a name of metrics.jsonl, a histogram or an image, `group/name`.

    TensorBoard gathers tags that begin alike, so that `eval_rsum` becomes `validation/rsum`.
    """
    if name.startswith(EVALUATED):
        return f"validation/{name.removeprefix(EVALUATED)}"
    return f"{_GROUP_OF.get(name, 'train')}/{name}"


class MetricLog:
    """Writes scalars, histograms and images, on process 0 alone.

    metrics.jsonl holds one line a write and no step twice: lines beyond `resumed_step` are dropped,
    and that of its validation unless that stands (`validated`). TensorBoard is left out, with a
    warning, where clu is not installed, and once its file cannot be written. `also` gets its
    scalars.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        resumed_step: int,
        validated: bool = True,
        also: WandbLog | None = None,
    ):
        self._path = workdir / FILE_NAME
        self._also = also
        self._writer = None
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._drop_after(resumed_step, validated)
        try:
            from clu import metric_writers
        except ImportError:
            _log.warning("clu is not installed: no TensorBoard logs, only %s", self._path)
            return
        self._writer = metric_writers.SummaryWriter(str(workdir))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars under a step; raises UserError if metrics.jsonl cannot be written."""
        if not self._active:
            return
        # JSON has no NaN: a mean over nothing is left out.
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        with as_user_error(f"{self._path}: cannot be written"), self._path.open("a") as stream:
            stream.write(json.dumps({"step": step, **finite}) + "\n")
        self._to_tensorboard(lambda writer: writer.write_scalars(step, _tagged(scalars)))
        if self._also is not None:
            self._also.write_scalars(step, _tagged(scalars))

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes histograms to TensorBoard."""
        self._to_tensorboard(lambda writer: writer.write_histograms(step, _tagged(arrays)))

    def write_images(self, step: int, render: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Writes [1, height, width, 3] uint8 images; without TensorBoard none is rendered."""
        self._to_tensorboard(lambda writer: writer.write_images(step, _tagged(render())))

    def _to_tensorboard(self, write):
        """Writes to TensorBoard's file, if there is one; after an error there is none."""
        if self._writer is None:
            return
        # Where clu is, TensorFlow is; training from arrays does without both.
        from tensorflow.errors import OpError

        try:
            write(self._writer)
        except OpError as error:
            self._writer = None
            _log.warning(
                "%s: TensorBoard's log cannot be written: %s; the run goes on without it",
                self._path.parent,
                first_line(error),
            )

    def close(self) -> None:
        """Makes TensorBoard's file current and waits until W&B has all of it."""
        self._to_tensorboard(lambda writer: writer.flush())
        if self._also is not None:
            self._also.close()

    def _drop_after(self, step, validated):
        def stays(line):
            redone = not validated and any(name.startswith(EVALUATED) for name in line)
            return line["step"] < step or (line["step"] == step and not redone)

        if self._path.exists():
            kept = filter(stays, read_metrics(self._path.parent))
            write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))


def _tagged(values):
    return {tensorboard_tag(name): value for name, value in values.items()}


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl, none where it does not exist."""
    path, lines = workdir / FILE_NAME, []
    if not path.exists():
        return lines
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut off by a crash, or still being written
            break
    return lines

"""What the frozen parts of the encoders make of a split, computed once and kept on disk.

A folder `frozen/<tower>-<digest>` beside the prepared datasets holds them. The digest is of all
that the bits depend on: the frozen weights, the tower, its input, and the program that computed
them. Whatever differs in any of it is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from fne_jax import files
from fne_jax.data.feature_rows import FeatureRows, read_rows, write_rows
from fne_jax.data.pairs import PairDataset
from fne_jax.encoders import freezing
from fne_jax.encoders.dual_encoder import IGNORING_PADDING
from fne_jax.encoders.inputs import FEATURES
from fne_jax.encoders.transformer import ALL
from fne_jax.errors import EnvironmentFailure, UserError
from fne_jax.model import checkpoints
from fne_jax.model.embedder import Embedder
from fne_jax.parallel import processes
from fne_jax.progress import Progress

_FOLDER = "frozen"
_ADVICE = "make room, or give another config.data.cache_dir or --config.data.keep_frozen=False"
_log = logging.getLogger(__name__)


def kept_towers(
    module: nn.Module, config: ml_collections.ConfigDict, *, training: bool
) -> list[str]:
    """Returns the towers whose frozen part's output is kept for a split.

    Args:
      module: The two towers.
      config: The resolved config.
      training: Whether the split is trained on; where its images are augmented, they are not kept.
    """
    if not config.data.keep_frozen:
        return []
    augmented = training and config.data.augmentation != "none"
    return [
        tower
        for tower in FEATURES
        if freezing.is_frozen_below(module, tower) and not (tower == "image" and augmented)
    ]


def keep(
    embedder: Embedder,
    params: Any,
    config: ml_collections.ConfigDict,
    dataset: PairDataset,
    tokens: tuple[np.ndarray, np.ndarray],
    *,
    training: bool,
) -> dict[str, FeatureRows]:
    """Returns what the frozen parts make of a split by tower, computed where it is not kept yet.

    All processes of a run call it together.

    Args:
      embedder: What runs the frozen parts.
      params: All parameters, on the devices.
      config: The resolved config.
      dataset: The split.
      tokens: The ids and the masks of its captions, both [pairs, length] int32.
      training: Whether the split is trained on.

    Raises:
      UserError: If the folder is remote, or what it holds is damaged.
      EnvironmentFailure: If it cannot be written.
    """
    module, kept = embedder.module, {}
    for tower in kept_towers(module, config, training=training):
        batch_size = embedder.batch_size
        if training:
            batch_size = config.global_batch_size // config.micro_batches
        about = _about(embedder, params, tower, dataset, tokens, batch_size, config.data.resize_to)
        mask = None if tower == "image" else _mask(module, tokens[1])
        count = len(dataset.image_id if tower == "image" else dataset.captions)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        folder = _cache(config) / _FOLDER / f"{tower}-{digest}"
        found = read_rows(folder, about, count, mask)
        if processes.highest(found is None):
            with _held(folder):
                found = read_rows(folder, about, count, mask)  # of another run meanwhile
                # Process 0 first; where others do not see what it wrote, they write it themselves.
                for first in (True, False):
                    writes = found is None and (jax.process_index() == 0 or not first)
                    if processes.highest(writes):
                        rows = embedder.frozen_rows(tower, params, dataset, tokens, batch_size)
                        rows = _shown(rows, f"{tower}s through the frozen encoder", count)
                        with processes.failing_together("config.data.cache_dir"):
                            _write(folder, about, rows, mask, writes)
                        found = read_rows(folder, about, count, mask)
        kept[tower] = found
    return kept


def _cache(config):
    if "://" in config.data.cache_dir:
        raise UserError(
            f"config.data.cache_dir is {config.data.cache_dir!r}, where nothing can be read by "
            "memory map; with config.data.keep_frozen give a folder on a disk"
        )
    return pathlib.Path(files.expand_home(config.data.cache_dir))


def _about(embedder, params, tower, dataset, tokens, batch_size, resize_to) -> dict[str, Any]:
    """Returns all that the rows depend on, to the last bit."""
    module, mesh = embedder.module, embedder.mesh
    encoder = getattr(module, tower)
    frozen = freezing.trained_and_frozen(module, {tower: params[tower]})[1]
    about = {
        "weights": checkpoints.fingerprints(frozen)[tower],
        "encoder": repr(encoder.clone(mesh=None)),
        "data": dataset.identity.checksum,
        "program": [jax.__version__, mesh.devices.flat[0].device_kind, mesh.size, batch_size],
    }
    if encoder.frozen_layers == ALL:
        about["pooling"] = getattr(module, f"{tower}_pooling")
    if tower == "image":
        # The checksum of the data is that of its sources.
        return about | {"pixels": embedder.pixel_statistics, "resize_to": resize_to}
    return about | {"tokens": hashlib.sha256(b"".join(map(np.ndarray.tobytes, tokens))).hexdigest()}


def _mask(module, mask):
    """Returns which tokens are kept; None where a caption is one vector."""
    if module.text.frozen_layers == ALL:
        return None
    return (
        mask.astype(bool) if module.text_pooling in IGNORING_PADDING else np.ones_like(mask, bool)
    )


@contextlib.contextmanager
def _held(folder):
    """Lets one run at a time compute the rows of a folder; another waits and uses them."""
    with contextlib.ExitStack() as stack:
        with processes.failing_together("config.data.cache_dir"):
            if jax.process_index() == 0:
                with files.as_user_error(f"{folder}: cannot be written", _ADVICE):
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    # What runs left that were killed, whatever they computed.
                    for lock in folder.parent.glob("*.lock"):
                        with contextlib.suppress(BlockingIOError), _locked(lock, _pass_by):
                            files.remove_leftovers(lock.with_suffix(""))
                    own = folder.with_name(f"{folder.name}.lock")
                    stack.enter_context(_locked(own, _wait))
        yield


def _locked(path, on_held):
    return files.locked(path, on_held, "begin no second run on this data at the same time")


def _pass_by(holder):
    raise BlockingIOError(holder)


def _write(folder, about, rows: Iterator[np.ndarray], mask, writes):
    """Writes the rows that all processes compute together, each to the last one."""
    if not writes:
        _drain(rows)
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_rows(folder, about, rows, mask)
        size = sum(file.stat().st_size for file in folder.iterdir())
        _log.info("kept in %s: %.1f MB", folder, size / 1e6)
    except OSError as error:
        _drain(rows)
        raise EnvironmentFailure(f"{folder}: cannot be written: {error}; {_ADVICE}") from error


def _drain(rows):
    for _ in rows:
        pass


def _wait(holder):
    _log.info("another run (%s) computes the frozen features of this split; waiting", holder)


def _shown(parts, what, total):
    with Progress(what, total, enabled=jax.process_index() == 0) as progress:
        for part in parts:
            yield part
            progress.advance(len(part))

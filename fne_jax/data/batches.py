"""Batches of a dataset as NumPy arrays, their order a function of (seed, step) alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from fne_jax.data.pairs import PairDataset

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which pairs make up which batch.

    Every epoch is a permutation of all pairs drawn from (seed, epoch); its last partial batch is
    dropped. Nothing depends on what was read before, so a run resumes at any step at once.

    Attributes:
      seed: of the permutations.
      pairs: number of pairs.
      global_batch_size: pairs in a batch, over all processes.
    """

    seed: int
    pairs: int
    global_batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.pairs // self.global_batch_size

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Returns the [pairs] permutation of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.pairs).astype(np.int32)

    def rows(self, steps: range, process: int = 0, processes: int = 1) -> Iterator[Rows]:
        """Yields this process's rows of each batch of a range of steps."""
        local = self.global_batch_size // processes
        epoch, order = -1, None
        for step in steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.epoch_order(epoch)
            start = (step % self.steps_per_epoch) * self.global_batch_size + process * local
            yield Rows(epoch=epoch, pair=order[start : start + local])


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a batch: the epoch, and [rows] int32 indices of pairs."""

    epoch: int
    pair: np.ndarray


def training_batches(
    dataset: PairDataset,
    tokens: tuple[np.ndarray, np.ndarray],
    order: BatchOrder,
    steps: range,
    *,
    image_size: int,
    augmentation: str,
    augment_on: str = "host",
    process: int = 0,
    processes: int = 1,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Yields this process's rows of the batches of a range of steps.

    Args:
      dataset: the training split.
      tokens: ids and masks of its captions, both [pairs, length] int32.
      order: which pairs make up which batch; its seed is also that of the augmentation.
      steps: the steps to yield.
      image_size: pixels of a side.
      augmentation: none, or a key of `augmentation.AUGMENTATIONS`.
      augment_on: host; or device, to which whole pictures go with what to do to them.
      process: index of this process.
      processes: number of processes; each reads its own rows of every batch.
      prefetch: batches prepared ahead.

    Yields:
      `image` [rows, side, side, 3] uint8, `input_ids` and `attention_mask` [rows, length] int32,
      `image_id` [rows] int32, `pair_id` [rows] int32; and for the device what
      `training_rows.DeviceRows` adds.

    Raises:
      UserError: naming a record that cannot be read or decoded.
    """
    rows = order.rows(steps, process, processes)
    if dataset.in_memory and augmentation == "none":
        for part in rows:
            image = dataset.images[dataset.caption_image[part.pair]]
            yield {"image": image} | _columns(dataset, tokens, part.pair)
        return
    from fne_jax.data.images import training_rows

    make_row = training_rows.row_maker(augmentation, augment_on, order.seed, image_size)
    if dataset.in_memory:
        for part in rows:
            made = [
                make_row(dataset.images[dataset.caption_image[pair]], part.epoch, int(pair))
                for pair in part.pair
            ]
            arrays = {name: np.stack([row[name] for row in made]) for name in made[0]}
            yield arrays | _columns(dataset, tokens, part.pair)
        return
    from fne_jax.data import tf_reader

    for pair, arrays in tf_reader.read_training_rows(
        dataset.images,
        ((dataset.caption_image[part.pair], part.epoch, part.pair) for part in rows),
        make_row,
        order.global_batch_size // processes,
        prefetch,
    ):
        yield arrays | _columns(dataset, tokens, pair)


def evaluation_images(
    dataset: PairDataset,
    image_size: int,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[np.ndarray]:
    """Yields this process's rows of batches that hold every image once, in order.

    Args:
      dataset: a split.
      image_size: pixels of a side.
      batch_size: images in a batch, over all processes.
      process: index of this process.
      processes: number of processes; each reads its own rows of every batch.

    Yields:
      [batch_size / processes, side, side, 3] uint8. The last batch is filled up with zeros; the
      caller knows how many images there are.

    Raises:
      UserError: naming a record that cannot be read or decoded.
    """
    count, local = len(dataset.image_id), batch_size // processes
    parts = local_parts(count, batch_size, process, processes)
    if dataset.in_memory:
        for part in parts:
            yield pad_rows(dataset.images[part], local)
        return
    from fne_jax.data import tf_reader

    yield from tf_reader.read_evaluation_images(dataset.images, parts, image_size, local)


def local_parts(count: int, batch_size: int, process: int, processes: int) -> Iterator[slice]:
    """Yields a process's rows of each batch of 0, 1, ..., count - 1; the last may have fewer."""
    local = batch_size // processes
    for start in range(process * local, count + process * local, batch_size):
        yield slice(min(start, count), min(start + local, count))


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """Returns `array` with zeros after its last row, up to `rows` rows."""
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def _columns(dataset, tokens, pair):
    ids, mask = tokens
    return {
        "input_ids": ids[pair],
        "attention_mask": mask[pair],
        "image_id": dataset.image_id[dataset.caption_image[pair]],
        "pair_id": pair.astype(np.int32),
    }

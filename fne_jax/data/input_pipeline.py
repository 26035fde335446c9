"""Batches of a dataset as NumPy arrays, their order a function of (seed, step) alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from fne_jax.data.datasets import PairDataset

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

    def augmentation_seeds(self, seed: int) -> np.ndarray:
        """Returns [rows, 2] int32, a function of (seed, epoch, pair)."""
        mixed = np.random.SeedSequence([seed, self.epoch]).generate_state(1).astype(np.int32)
        return np.stack([np.broadcast_to(mixed, self.pair.shape), self.pair], axis=1)


def training_batches(
    dataset: PairDataset,
    tokens: tuple[np.ndarray, np.ndarray],
    order: BatchOrder,
    steps: range,
    *,
    image_size: int,
    augmentation: str,
    process: int = 0,
    processes: int = 1,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Yields this process's rows of the batches of a range of steps.

    Args:
      dataset: the training split.
      tokens: ids and masks of its captions, both [pairs, length] int32.
      order: which pairs make up which batch.
      steps: the steps to yield.
      image_size: pixels of a side.
      augmentation: a key of `image_preprocessing.AUGMENTATIONS`; in-memory images are not
        augmented.
      process: index of this process.
      processes: number of processes; each reads its own rows of every batch.
      prefetch: batches prepared ahead.

    Yields:
      `image` [rows, side, side, 3] uint8, `input_ids` and `attention_mask` [rows, length] int32,
      `image_id` [rows] int32, `pair_id` [rows] int32.
    """
    rows = order.rows(steps, process, processes)
    if dataset.in_memory:
        for part in rows:
            image = dataset.images[dataset.caption_image[part.pair]]
            yield {"image": image} | _columns(dataset, tokens, part.pair)
        return
    seeded = ((part.pair, part.augmentation_seeds(order.seed)) for part in rows)
    local = order.global_batch_size // processes
    for pair, image in _read_images(dataset, seeded, local, image_size, augmentation, prefetch):
        yield {"image": image} | _columns(dataset, tokens, pair)


def evaluation_images(
    dataset: PairDataset, image_size: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Yields every image once, in order, in batches [batch_size, side, side, 3] uint8.

    The last batch is filled up with zeros; the caller knows how many images there are.
    """
    count = len(dataset.image_id)
    if dataset.in_memory:
        for start in range(0, count, batch_size):
            yield pad_rows(dataset.images[start : start + batch_size], batch_size)
        return
    from fne_jax.data import tf_reader

    for images in tf_reader.read_evaluation_images(dataset.images, count, image_size, batch_size):
        yield pad_rows(images, batch_size)


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


def _read_images(dataset, seeded, local, image_size, augmentation, prefetch):
    from fne_jax.data import tf_reader

    return tf_reader.read_training_images(
        dataset.images,
        ((dataset.caption_image[pair], pair, seeds) for pair, seeds in seeded),
        local,
        image_size,
        augmentation,
        prefetch,
    )

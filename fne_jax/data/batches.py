"""Batches of a dataset as NumPy arrays, their order a function of (seed, step) alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.pairs import PairDataset

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which pairs make up which batch.

    Every epoch is a permutation of the pairs sampled from (seed, epoch); its last partial batch is
    dropped. Nothing depends on what was read before, so a run resumes at any step at once.

    Attributes:
      seed: The seed of the permutations.
      pairs: The number of pairs.
      global_batch_size: The pairs in a batch, over all processes.
      left_out: The rows of pairs that are in no batch; the others keep their order.
    """

    seed: int
    pairs: int
    global_batch_size: int
    left_out: tuple[int, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """The number of full batches in an epoch."""
        return (self.pairs - len(self.left_out)) // self.global_batch_size

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Returns the int32 permutation of an epoch, of all pairs but those that are left out."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.pairs).astype(np.int32)
        return order[~np.isin(order, self.left_out)]

    def rows(self, steps: range, local: np.ndarray | None = None) -> Iterator[Rows]:
        """Yields the rows of each batch of a range of steps that a process reads.

        `local` are the [rows] places within a batch that it reads, in increasing order, e.g. from
        `parallel.sharding.local_rows`; None for all.
        """
        local = np.arange(self.global_batch_size) if local is None else local
        epoch, order = -1, None
        for step in steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.epoch_order(epoch)
            start = (step % self.steps_per_epoch) * self.global_batch_size
            yield Rows(epoch=epoch, pair=order[start + local])


@dataclasses.dataclass(frozen=True)
class Rows:
    """The [rows] int32 indices of a batch's pairs, and the number of its epoch, from 0."""

    epoch: int
    pair: np.ndarray


def training_batches(
    dataset: PairDataset,
    tokens: tuple[np.ndarray, np.ndarray],
    batches: Iterable[Rows],
    make_image: TrainingImages,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Yields the arrays of batches.

    Args:
      dataset: The training split.
      tokens: The ids and the masks of its captions, both [pairs, length] integers.
      batches: The rows of each batch, as many in each, e.g. from `BatchOrder.rows`.
      make_image: What makes a training image of a stored one.
      prefetch: The number of batches that are prepared ahead.

    Yields:
      `image` [rows, side, side, 3] uint8, `input_ids` and `attention_mask` [rows, length] int32,
      `image_id` [rows] int32 and `pair_id` [rows] int32. Of what the split keeps, `image_features`
      in place of `image`, and `text_features`.

    Raises UserError if a record cannot be read or decoded; it names the record.
    """
    ids, mask = tokens
    kept_image, kept_text = (dataset.kept.get(tower) for tower in ("image", "text"))
    if kept_image is None:
        images = _training_images(dataset, iter(batches), make_image, prefetch)
        images = ((pair, {"image": image}) for pair, image in images)
    else:
        images = (
            (rows.pair, {"image_features": kept_image[dataset.caption_image[rows.pair]]})
            for rows in batches
        )
    for pair, image in images:
        yield {
            **image,
            **({} if kept_text is None else {"text_features": kept_text[pair]}),
            "input_ids": ids[pair].astype(np.int32),
            "attention_mask": mask[pair].astype(np.int32),
            "image_id": dataset.image_id[dataset.caption_image[pair]],
            "pair_id": pair.astype(np.int32),
        }


def _training_images(dataset, batches, make_image, prefetch):
    """Yields the [rows] pairs and the [rows, side, side, 3] uint8 images of each batch."""
    if dataset.in_memory:
        for rows in batches:
            stored = dataset.images[dataset.caption_image[rows.pair]]
            pairs = zip(stored, rows.pair, strict=True)
            yield rows.pair, np.stack([make_image(image, rows.epoch, int(p)) for image, p in pairs])
        return
    first = next(batches, None)
    if first is None:
        return
    # Kept out of the module's imports: training from arrays must work without TensorFlow.
    from fne_jax.data import tf_reader

    yield from tf_reader.read_images(
        dataset.images,
        (
            (dataset.caption_image[rows.pair], rows.epoch, rows.pair)
            for rows in itertools.chain([first], batches)
        ),
        make_image,
        len(first.pair),
        prefetch,
    )


def evaluation_images(
    dataset: PairDataset, image_size: int, batch_size: int, local: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yields a process's rows of batches that hold every image once, in order.

    They are [rows, side, side, 3] uint8; the last batch is filled up with zeros. `batch_size` and
    `local` are as of `local_parts`. Raises UserError, naming the record, if one cannot be read.
    """
    rows = batch_size if local is None else len(local)
    parts = local_parts(len(dataset.image_id), batch_size, local)
    if dataset.in_memory:
        for part in parts:
            yield pad_rows(dataset.images[part], rows)
        return
    # Kept out of the module's imports: evaluating arrays must work without TensorFlow.
    from fne_jax.data import tf_reader

    padded = (
        np.pad(part.astype(np.int32), (0, rows - len(part)), constant_values=-1) for part in parts
    )
    batches = ((images, 0, images) for images in padded)
    make_image = TrainingImages(image_size, "none", seed=0)
    for _, images in tf_reader.read_images(dataset.images, batches, make_image, rows, 2):
        yield images


def local_parts(
    count: int, batch_size: int, local: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yields a process's items of each batch of 0, 1, ..., count - 1; the last may have fewer.

    `batch_size` counts the items of all processes, and `local` are the [rows] places within a batch
    that this one reads, in increasing order; None for all.
    """
    local = np.arange(batch_size) if local is None else local
    for start in range(0, count, batch_size):
        yield start + local[start + local < count]


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """Returns an array with zeros after its last row, so that it has `rows` rows."""
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))

"""Reading, decoding and augmenting images with tf.data, deterministically and in parallel."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from fne_jax.data import image_preprocessing
from fne_jax.data.records import RecentRecords, RecordSource

# Batches that may be between the reading of a record and the error about it.
_IN_FLIGHT = 32


def read_training_images(
    source: RecordSource,
    rows: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
    batch_size: int,
    image_size: int,
    augmentation: str,
    prefetch: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the pairs and augmented images of each batch.

    Args:
      source: random-access records whose `image` is a JPEG.
      rows: for each batch the images' indices, the pairs' indices and the augmentation's seeds,
        [batch], [batch] and [batch, 2] int32.
      batch_size: rows in a batch.
      image_size: pixels of a side.
      augmentation: a key of `image_preprocessing.AUGMENTATIONS`.
      prefetch: batches prepared ahead.

    Yields:
      [batch] int32 pair indices and [batch, side, side, 3] uint8 images.

    Raises:
      UserError: naming the record, if one is damaged.
    """
    recent = RecentRecords(source, (prefetch + _IN_FLIGHT) * batch_size)
    augment = image_preprocessing.AUGMENTATIONS[augmentation]
    signature = (
        tf.TensorSpec([batch_size], tf.int32),
        tf.TensorSpec([batch_size], tf.int32),
        tf.TensorSpec([batch_size, 2], tf.int32),
    )
    batches = tf.data.Dataset.from_generator(lambda: rows, output_signature=signature)
    batches = batches.map(
        lambda image, pair, seeds: (pair, _read_jpegs(recent, image, batch_size), seeds),
        num_parallel_calls=2,
        deterministic=True,
    )
    images = batches.unbatch().map(
        lambda pair, jpeg, seed: (pair, augment(jpeg, image_size, seed)),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    with recent.damage_named():
        yield from images.batch(batch_size).prefetch(prefetch).as_numpy_iterator()


def read_evaluation_images(
    source: RecordSource, count: int, image_size: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Yields all images in order, [up to batch_size, side, side, 3] uint8 each time.

    Raises:
      UserError: naming the record, if one is damaged.
    """
    recent = RecentRecords(source, _IN_FLIGHT * batch_size)

    def read(index):
        jpeg = _read_jpegs(recent, index[None], 1)[0]
        return image_preprocessing.evaluation_image(jpeg, image_size)

    images = tf.data.Dataset.range(count).map(
        read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    with recent.damage_named():
        yield from images.batch(batch_size).prefetch(2).as_numpy_iterator()


def _read_jpegs(recent, index, count):
    def read(index):
        return np.array(recent.jpegs(index.tolist()), object)

    jpegs = tf.numpy_function(read, [index], tf.string, stateful=False)
    return tf.ensure_shape(jpegs, [count])

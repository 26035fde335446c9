"""Reading, decoding and augmenting images with tf.data, deterministically and in parallel.

The work on an image is NumPy and OpenCV inside `tf.numpy_function`, several times faster than
TensorFlow's own operations; both release Python's lock while they work, so that a map over images
uses all cores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from fne_jax.data.images import preprocessing
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.preparation.records import RecordSource
from fne_jax.errors import UserError


def read_training_images(
    source: RecordSource,
    rows: Iterator[tuple[np.ndarray, int, np.ndarray]],
    make_image: TrainingImages,
    batch_size: int,
    prefetch: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the pairs and the images of each batch.

    Args:
      source: The records of the split.
      rows: For each batch the [batch] indices of the images, the epoch, and the [batch] indices of
        the pairs.
      make_image: What makes a training image of a JPEG, the epoch and the pair.
      batch_size: The rows in a batch.
      prefetch: The number of batches that are prepared ahead.

    Yields:
      The [batch] int32 indices of the pairs, and the [batch, side, side, 3] uint8 images.

    Raises:
      UserError: If a record cannot be read or decoded; it names the record.
    """
    records = _Records(source)

    def made(jpeg, image, epoch, pair):
        with records.naming(image):
            return make_image(jpeg, int(epoch), int(pair))

    def pixels(jpeg, image, epoch, pair):
        made_image = tf.numpy_function(made, [jpeg, image, epoch, pair], tf.uint8, stateful=False)
        return pair, tf.ensure_shape(made_image, [make_image.size, make_image.size, 3])

    def split(image, epoch, pair):
        jpegs = tf.numpy_function(records.read, [image], tf.string, stateful=False)
        return tf.ensure_shape(jpegs, [batch_size]), image, tf.repeat(epoch, batch_size), pair

    columns = tf.TensorSpec([batch_size], tf.int32)
    batches = tf.data.Dataset.from_generator(
        lambda: rows, output_signature=(columns, tf.TensorSpec([], tf.int32), columns)
    )
    batches = batches.map(split, num_parallel_calls=2, deterministic=True)
    batches = batches.unbatch().map(pixels, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    yield from records.iterate(batches.batch(batch_size).prefetch(prefetch))


def read_evaluation_images(
    source: RecordSource, parts: Iterator[np.ndarray], image_size: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Yields [batch_size, side, side, 3] uint8 images, zeros after those that a part names.

    Args:
      source: The records of the split.
      parts: The images of each batch, at most `batch_size` of them.
      image_size: The pixels of a side.
      batch_size: The rows in a batch.

    Raises:
      UserError: If a record cannot be read or decoded; it names the record.
    """
    records = _Records(source)

    def resized(index):
        if index < 0:
            return np.zeros((image_size, image_size, 3), np.uint8)
        jpeg = records.read(index[None])[0]
        with records.naming(index):
            return preprocessing.evaluation_image(jpeg, image_size)

    def image(index):
        pixels = tf.numpy_function(resized, [index], tf.uint8, stateful=False)
        return tf.ensure_shape(pixels, [image_size, image_size, 3])

    def indices():
        for part in parts:
            yield from part
            yield from [-1] * (batch_size - len(part))

    images = tf.data.Dataset.from_generator(
        indices, output_signature=tf.TensorSpec([], tf.int64)
    ).map(image, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    yield from records.iterate(images.batch(batch_size).prefetch(2))


class _Records:
    """The records of a split, and the first error met while reading them in the background."""

    def __init__(self, source: RecordSource):
        self._source = source
        self._failure: UserError | None = None

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the JPEGs of records as a [records] array of bytes."""
        with self._kept():
            records = self._source.__getitems__(indices.tolist())
        return np.array([record["image"] for record in records], object)

    @contextlib.contextmanager
    def naming(self, index: int) -> Iterator[None]:
        """Turns the error that a damaged image causes into one that names the record."""
        with self._kept():
            try:
                yield
            except ValueError as error:
                raise self._source.damage(int(index), error) from error

    def iterate(self, batches: tf.data.Dataset) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields NumPy elements; an error in the background comes out as what caused it."""
        elements = batches.as_numpy_iterator()
        try:
            yield from elements
        except tf.errors.OpError as error:
            if self._failure is not None:
                raise self._failure from error
            raise
        finally:
            # Or else the error's traceback would keep it until the interpreter has ended, which
            # it waits for in vain, for half a minute.
            del elements

    @contextlib.contextmanager
    def _kept(self):
        """Keeps the first error for `iterate`, because tf.data passes on no more than its text."""
        try:
            yield
        except UserError as error:
            self._failure = self._failure or error
            raise

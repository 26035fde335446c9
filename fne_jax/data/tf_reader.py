"""Reading, decoding and augmenting images with tf.data, deterministically and in parallel.

The work on an image is NumPy and OpenCV inside `tf.numpy_function`, several times faster than
TensorFlow's own operations; both release Python's lock while they work, so that a map over images
uses all cores.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.preparation.storage import RecordSource

# TensorFlow reads data on the host alone; the accelerator's memory is JAX's.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

# Each read starts a thread for each file that it finds rows in, which is dear for few rows a file.
_ROWS_PER_READ = 512


def read_images(
    source: RecordSource,
    rows: Iterator[tuple[np.ndarray, int, np.ndarray]],
    make_image: TrainingImages,
    batch_size: int,
    prefetch: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the [batch] int32 pairs and the [batch, side, side, 3] uint8 images of each batch.

    Args:
      source: The records of the split.
      rows: For each batch the [batch] int32 indices of the images, -1 for one that is blank, the
        epoch, and the [batch] int32 indices of the pairs.
      make_image: What makes an image of a JPEG, the epoch and the pair.
      batch_size: The rows in a batch.
      prefetch: The number of batches that are prepared ahead.

    Raises UserError if a record cannot be read or decoded; it names the record.
    """
    records = _Records(source)
    blank = np.zeros((make_image.size, make_image.size, 3), np.uint8)

    def made(jpeg, image, epoch, pair):
        if image < 0:
            return blank
        return records.decoded(blank, int(image), make_image, jpeg, int(epoch), int(pair))

    def pixels(jpeg, image, epoch, pair):
        made_image = tf.numpy_function(made, [jpeg, image, epoch, pair], tf.uint8, stateful=False)
        return pair, tf.ensure_shape(made_image, blank.shape)

    def split(image, epoch, pair):
        image = tf.reshape(image, [-1])
        jpegs = tf.numpy_function(records.jpegs, [image], tf.string, stateful=False)
        jpegs = tf.ensure_shape(jpegs, [None])
        return jpegs, image, tf.repeat(epoch, batch_size), tf.reshape(pair, [-1])

    columns = tf.TensorSpec([batch_size], tf.int32)
    batches = tf.data.Dataset.from_generator(
        lambda: rows, output_signature=(columns, tf.TensorSpec([], tf.int32), columns)
    )
    read = batches.batch(max(1, _ROWS_PER_READ // batch_size))
    batches = read.map(split, num_parallel_calls=1, deterministic=True)
    batches = batches.unbatch().map(pixels, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    yield from records.iterate(batches.batch(batch_size).prefetch(prefetch))


class _Records:
    """The records of a split as tf.data's threads read them, and the first error met there.

    An error must not leave a `tf.numpy_function`: TensorFlow would log its traceback and keep no
    more than its text. It is kept here instead, blank images stand in for what is read from then
    on, and the thread that iterates raises it.
    """

    def __init__(self, source: RecordSource):
        self._source = source
        self._failure: Exception | None = None
        self._iterator: Iterator[tuple[np.ndarray, ...]] | None = None
        self._closed = False

    def jpegs(self, indices: np.ndarray) -> np.ndarray:
        """Returns the JPEGs of records as a [records] array of bytes, b"" of -1, after an error."""
        there = np.flatnonzero(indices >= 0)

        def read():
            jpegs = np.full(len(indices), b"", object)
            if len(there):
                records = self._source.__getitems__(indices[there].tolist())
                jpegs[there] = [record["image"] for record in records]
            return jpegs

        return self._kept(read, np.full(len(indices), b"", object))

    def decoded(
        self, blank: np.ndarray, index: int, make: Callable[..., np.ndarray], *arguments: Any
    ) -> np.ndarray:
        """Returns what `make` makes of the JPEG of a record, or `blank` after an error."""

        def named():
            try:
                return make(*arguments)
            except ValueError as error:
                raise self._source.damage(index, error) from error

        return self._kept(named, blank)

    def _kept(self, call, otherwise):
        if self._failure is not None or self._closed:
            return otherwise
        try:
            return call()
        except Exception as error:
            self._failure = self._failure or error
            return otherwise

    def iterate(self, batches: tf.data.Dataset) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields NumPy elements; an error in the background is raised here."""
        self._iterator = batches.as_numpy_iterator()
        _open.add(self)
        try:
            # No `for`, which would hold the iterator where `close` cannot let go of it.
            while (batch := next(self._iterator, None)) is not None:
                # A batch may hold blanks since an error that came while it was waited for.
                if self._failure is not None:
                    raise self._failure
                yield batch
        finally:
            self.close()

    def close(self) -> None:
        """Ends the threads of tf.data that read for `iterate`."""
        self._closed = True
        self._iterator = None
        _open.discard(self)


# A thread of tf.data that calls Python while the interpreter ends would keep the process from
# ending, or abort it. Whatever else holds an unfinished iteration by then (the traceback of an
# error, say), its threads end first.
_open: weakref.WeakSet[_Records] = weakref.WeakSet()


@atexit.register
def _close_all():
    for records in list(_open):
        records.close()

"""TensorFlow as a reader of data on the host alone."""

from __future__ import annotations

import tensorflow as tf


def hide_accelerators() -> None:
    """Keeps TensorFlow off the accelerator, whose memory it would take from JAX."""
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")

"""Embedding whole splits in fixed-size padded batches over all devices."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fne_jax.data.batches import evaluation_images, local_parts, pad_rows
from fne_jax.data.pairs import PairDataset
from fne_jax.encoders.pixels import normalize_pixels
from fne_jax.parallel import sharding

# By which the sizes of batches differ, the smallest being one row for each device.
_SIZE_STEP = 4


class Embedder:
    """Embeds images and captions; each tower is compiled once for each size of batches.

    Splits take batches of one size alone. What is given by itself, a query say, takes the smallest
    of a few sizes that holds it.

    Args:
      module: The two towers.
      mesh: The devices to spread a batch over.
      batch_size: How many images or captions are embedded at once, over all devices; filled up to
        a multiple of these.
      image_size: The pixels of an image's side.
      pixel_statistics: The mean and the standard deviation of each channel, in [0, 1].
      before_batch: Called before each batch; what it raises ends the embedding.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: jax.sharding.Mesh,
        *,
        batch_size: int,
        image_size: int,
        pixel_statistics: tuple[tuple[float, ...], tuple[float, ...]],
        before_batch: Callable[[], None] = lambda: None,
    ):
        self._mesh, self._image_size = mesh, image_size
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._before_batch = before_batch
        rows, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        jit = functools.partial(jax.jit, in_shardings=(None, rows), out_shardings=replicated)

        @jit
        def encode_images(params, batch):
            pixels = normalize_pixels(batch["image"], *pixel_statistics)
            return module.apply({"params": params}, pixels, method=module.encode_image)

        @jit
        def encode_texts(params, batch):
            tokens = batch["input_ids"], batch["attention_mask"]
            return module.apply({"params": params}, *tokens, method=module.encode_text)

        self._encode_images, self._encode_texts = encode_images, encode_texts

    @property
    def batch_size(self) -> int:
        """How many images or captions are embedded at once, over all devices."""
        return self._batch_size

    def images(self, params: Any, dataset: PairDataset) -> np.ndarray:
        """Returns the [images, dim] float32 embeddings of a split, in order."""
        local = self._local(self._batch_size)
        batches = evaluation_images(dataset, self._image_size, self._batch_size, local)
        batches = ({"image": images} for images in batches)
        embeddings = self._embed(self._encode_images, params, batches, self._batch_size)
        return embeddings[: len(dataset.image_id)]

    def captions(self, params: Any, tokens: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Returns the [captions, dim] float32 embeddings of a split's ids and masks, in order."""
        return self._texts(params, tokens, self._batch_size)

    def pixels(self, params: Any, parts: Iterable[np.ndarray]) -> np.ndarray:
        """Returns the [images, dim] float32 embeddings of images that are given by themselves.

        Args:
          params: The parameters of the two towers.
          parts: The images, [images, side, side, 3] uint8, in parts of `batch_size` each; the last
            may have fewer. They are asked for as they are needed.
        """
        found = []
        for part in parts:
            size = self._smallest(len(part))
            batches = ({"image": part[rows]} for rows in self._rows(len(part), size))
            found.append(self._embed(self._encode_images, params, batches, size)[: len(part)])
        side = self._image_size
        example = {"image": np.zeros((self._mesh.size, side, side, 3), np.uint8)}
        return (
            np.concatenate(found) if found else self._nothing(self._encode_images, params, example)
        )

    def texts(self, params: Any, tokens: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Returns the [texts, dim] float32 embeddings of texts that are given by themselves.

        Args:
          params: The parameters of the two towers.
          tokens: The ids and the masks, [texts, length] int32.
        """
        return self._texts(params, tokens, self._smallest(len(tokens[0])))

    def _texts(self, params, tokens, size):
        ids, mask = tokens
        if not len(ids):
            example = np.zeros((self._mesh.size, *ids.shape[1:]), np.int32)
            batch = {"input_ids": example, "attention_mask": example}
            return self._nothing(self._encode_texts, params, batch)
        batches = (
            {"input_ids": ids[rows], "attention_mask": mask[rows]}
            for rows in self._rows(len(ids), size)
        )
        return self._embed(self._encode_texts, params, batches, size)[: len(ids)]

    def _smallest(self, count):
        """Returns the smallest size of batches that holds so many rows, or else the largest."""
        size = self._mesh.size
        while size < min(count, self._batch_size):
            size *= _SIZE_STEP
        return min(size, self._batch_size)

    def _local(self, size):
        return sharding.local_rows(self._mesh, size)

    def _rows(self, count: int, size: int) -> Iterator[np.ndarray]:
        """Returns this process's rows of each batch of `count`; the last may have fewer or none."""
        return local_parts(count, size, self._local(size))

    def _nothing(self, encode, params, batch):
        """Returns the [0, dim] embeddings of no rows."""
        return np.zeros((0, jax.eval_shape(encode, params, batch).shape[-1]), np.float32)

    def _embed(self, encode, params, batches: Iterable[dict[str, np.ndarray]], size):
        """Returns the rows of all batches of a size; each is given as this process's rows."""
        parts, running = [], collections.deque()
        for batch in batches:
            self._before_batch()
            padded = {
                name: pad_rows(array, len(self._local(size))) for name, array in batch.items()
            }
            # Replicated by `out_shardings`, so that each process can fetch all of it.
            running.append(encode(params, sharding.to_devices(padded, self._mesh)))
            # Two stay in flight: more would hold the devices' memory, and back what stops this.
            if len(running) > 2:
                parts.append(jax.device_get(running.popleft()))
        return np.concatenate([*parts, *jax.device_get(list(running))])

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
from fne_jax.data.feature_rows import FeatureRows
from fne_jax.data.pairs import PairDataset
from fne_jax.encoders.freezing import is_frozen_below
from fne_jax.encoders.inputs import FEATURES, embed_one, frozen_features
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

    Attributes:
      module: The two towers.
      mesh: The devices.
      batch_size: How many images or captions are embedded at once, over all devices.
      pixel_statistics: The mean and the standard deviation of each channel, in [0, 1].
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
        self.module, self.mesh, self.pixel_statistics = module, mesh, pixel_statistics
        self._image_size = image_size
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._before_batch = before_batch
        rows, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)

        def jit(function, place, *names):
            def run(params, batch):
                return function(module.apply, params, batch, pixel_statistics, *names)

            return jax.jit(run, in_shardings=(None, rows), out_shardings=place)

        self._encoders = {tower: jit(embed_one, replicated, tower) for tower in FEATURES}
        # Once for what is embedded at once, and once for what is kept, which each process needs.
        self._frozen = jit(frozen_features, rows)
        self._frozen_whole = jit(frozen_features, replicated)

    def images(self, params: Any, dataset: PairDataset) -> np.ndarray:
        """Returns the [images, dim] float32 embeddings of a split, in order."""
        count, kept = len(dataset.image_id), dataset.kept.get("image")
        if kept is None:
            batches = self._image_batches(dataset, self.batch_size)
        else:
            rows = self._rows(count, self.batch_size)
            batches = ({FEATURES["image"]: kept[part]} for part in rows)
        return self._embed("image", params, batches, self.batch_size)[:count]

    def captions(
        self, params: Any, tokens: tuple[np.ndarray, np.ndarray], kept: FeatureRows | None = None
    ) -> np.ndarray:
        """Returns the [captions, dim] float32 embeddings of a split's captions, in order.

        Args:
          params: The parameters of the two towers.
          tokens: The ids and the masks, [captions, length] integers.
          kept: What the frozen part makes of each caption, where that is kept.
        """
        return self._texts(params, tokens, self.batch_size, kept)

    def frozen_rows(
        self,
        tower: str,
        params: Any,
        dataset: PairDataset,
        tokens: tuple[np.ndarray, np.ndarray],
        batch_size: int,
    ) -> Iterator[np.ndarray]:
        """Yields what the frozen part of a tower makes of a split, in order, [rows, ...] at a time.

        Args:
          tower: "image" or "text".
          params: The parameters of the two towers.
          dataset: The split.
          tokens: The ids and the masks of its captions, [captions, length] integers.
          batch_size: How many go through at once, over all devices, which divide it.
        """
        if tower == "image":
            left, batches = len(dataset.image_id), self._image_batches(dataset, batch_size)
        else:
            left, batches = len(tokens[0]), self._token_batches(tokens, batch_size)
        for part in self._run(self._frozen_whole, {tower: params[tower]}, batches, batch_size):
            yield part[:left]
            left -= len(part)

    def _image_batches(self, dataset, size):
        local = self._local(size)
        images = evaluation_images(dataset, self._image_size, size, local)
        return ({"image": part} for part in images)

    def _token_batches(self, tokens, size, kept=None):
        ids, mask = tokens
        for rows in self._rows(len(ids), size):
            batch = {"input_ids": ids[rows], "attention_mask": mask[rows]}
            batch = {name: values.astype(np.int32) for name, values in batch.items()}
            yield batch if kept is None else batch | {FEATURES["text"]: kept[rows]}

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
            found.append(self._embed("image", params, batches, size)[: len(part)])
        side = self._image_size
        example = {"image": np.zeros((self.mesh.size, side, side, 3), np.uint8)}
        return np.concatenate(found) if found else self._nothing("image", params, example)

    def texts(self, params: Any, tokens: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Returns the [texts, dim] float32 embeddings of texts that are given by themselves.

        Args:
          params: The parameters of the two towers.
          tokens: The ids and the masks, [texts, length] int32.
        """
        return self._texts(params, tokens, self._smallest(len(tokens[0])))

    def _texts(self, params, tokens, size, kept=None):
        count = len(tokens[0])
        if not count:
            example = np.zeros((self.mesh.size, *tokens[0].shape[1:]), np.int32)
            batch = {"input_ids": example, "attention_mask": example}
            return self._nothing("text", params, batch)
        batches = self._token_batches(tokens, size, kept)
        return self._embed("text", params, batches, size)[:count]

    def _smallest(self, count):
        """Returns the smallest size of batches that holds so many rows, or else the largest."""
        size = self.mesh.size
        while size < min(count, self.batch_size):
            size *= _SIZE_STEP
        return min(size, self.batch_size)

    def _local(self, size):
        return sharding.local_rows(self.mesh, size)

    def _rows(self, count: int, size: int) -> Iterator[np.ndarray]:
        """Returns this process's rows of each batch of `count`; the last may have fewer or none."""
        return local_parts(count, size, self._local(size))

    def _nothing(self, tower, params, batch):
        """Returns the [0, dim] embeddings of no rows."""
        shape = jax.eval_shape(functools.partial(self._encode, tower), params, batch).shape
        return np.zeros((0, shape[-1]), np.float32)

    def _encode(self, tower, params, batch):
        """Returns the embeddings of a batch on the devices."""
        name = FEATURES[tower]
        if name not in batch and is_frozen_below(self.module, tower):
            # By a program of its own, so that what is kept is the same to the bit.
            features = self._frozen({tower: params[tower]}, batch)
            batch = {key: value for key, value in batch.items() if key != "image"}
            batch |= {name: features}
        return self._encoders[tower](params, batch)

    def _embed(self, tower, params, batches: Iterable[dict[str, np.ndarray]], size):
        """Returns the embeddings of all batches of a size; each is given as this process's rows."""
        parts = self._run(functools.partial(self._encode, tower), params, batches, size)
        return np.concatenate(list(parts))

    def _run(self, encode, params, batches, size):
        """Yields the rows that a program makes of each batch of a size."""
        running = collections.deque()
        for batch in batches:
            self._before_batch()
            padded = {
                name: pad_rows(array, len(self._local(size))) for name, array in batch.items()
            }
            # Replicated by `out_shardings`, so that each process can fetch all of it.
            running.append(encode(params, sharding.to_devices(padded, self.mesh)))
            # Two stay in flight: more would hold the devices' memory, and back what stops this.
            if len(running) > 2:
                yield jax.device_get(running.popleft())
        while running:
            yield jax.device_get(running.popleft())

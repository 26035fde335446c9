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


class Embedder:
    """Embeds images and captions; each tower is compiled once.

    Args:
      module: The two towers.
      mesh: The devices to spread a batch over.
      batch_size: How many images or captions are embedded at once, over all devices.
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
        self._mesh, self._batch_size, self._image_size = mesh, batch_size, image_size
        self._local = sharding.local_rows(mesh, batch_size)
        self._before_batch = before_batch
        rows, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        layout = sharding.StepLayout(mesh)
        # Parameters are taken as they lie, sharded or replicated, and gathered where they are used.
        jit = functools.partial(jax.jit, in_shardings=(None, rows), out_shardings=replicated)

        @jit
        def encode_images(params, batch):
            pixels = normalize_pixels(batch["image"], *pixel_statistics)
            return module.apply(
                {"params": layout.replicated(params)}, pixels, method=module.encode_image
            )

        @jit
        def encode_texts(params, batch):
            tokens = batch["input_ids"], batch["attention_mask"]
            return module.apply(
                {"params": layout.replicated(params)}, *tokens, method=module.encode_text
            )

        self._encode_images, self._encode_texts = encode_images, encode_texts

    def images(self, params: Any, dataset: PairDataset) -> np.ndarray:
        """Returns the [images, dim] float32 embeddings of a split, in order."""
        batches = evaluation_images(dataset, self._image_size, self._batch_size, self._local)
        batches = ({"image": images} for images in batches)
        return self._embed(self._encode_images, params, batches, len(dataset.image_id))

    def pixels(self, params: Any, images: np.ndarray) -> np.ndarray:
        """Returns the [images, dim] float32 embeddings of [images, side, side, 3] uint8."""
        batches = ({"image": images[part]} for part in self._parts(len(images)))
        return self._embed(self._encode_images, params, batches, len(images))

    def texts(self, params: Any, tokens: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Returns the [captions, dim] float32 embeddings of ids and masks [captions, length]."""
        ids, mask = tokens
        batches = (
            {"input_ids": ids[part], "attention_mask": mask[part]} for part in self._parts(len(ids))
        )
        return self._embed(self._encode_texts, params, batches, len(ids))

    def _parts(self, count: int) -> Iterator[np.ndarray]:
        """Returns this process's rows of each batch of `count`; the last may have fewer or none."""
        return local_parts(count, self._batch_size, self._local)

    def _embed(self, encode, params, batches: Iterable[dict[str, np.ndarray]], count):
        """Returns the first `count` rows; each batch holds this process's rows of a global one."""
        parts, running = [], collections.deque()
        for batch in batches:
            self._before_batch()
            padded = {name: pad_rows(array, len(self._local)) for name, array in batch.items()}
            # Replicated by `out_shardings`, so that each process can fetch all of it.
            running.append(encode(params, sharding.to_devices(padded, self._mesh)))
            # Two stay in flight: more would hold the devices' memory, and back what stops this.
            if len(running) > 2:
                parts.append(jax.device_get(running.popleft()))
        return np.concatenate([*parts, *jax.device_get(list(running))])[:count]

"""Exact search of a split in memory, for texts and by its own images."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np

from fne_jax.index import exact
from fne_jax.model.embedded_split import EmbeddedSplit


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      rows: [found] rows of images or of captions, the most similar first.
      similarity: [found] float32 cosines to what was asked for.
    """

    rows: np.ndarray
    similarity: np.ndarray


class SplitSearch:
    """Searches a split by its embeddings, kept as float16 as an index keeps them.

    One object serves several threads.

    Args:
      embed_texts: Takes texts and returns their [texts, dim] L2-normalised embeddings.
      embedded: The split's embeddings.
    """

    def __init__(self, embed_texts: Callable[[list[str]], np.ndarray], embedded: EmbeddedSplit):
        self._embed_texts = embed_texts
        self._images = embedded.image_emb.astype(np.float16)
        self._captions = embedded.text_emb.astype(np.float16)
        self._lock = threading.Lock()

    def images_for_text(self, text: str, count: int) -> Found:
        """Returns the `count` images most similar to a text."""
        with self._lock:
            query = self._embed_texts([text])
        return _top(query, self._images, count)

    def images_for_image(self, row: int, count: int) -> Found:
        """Returns the `count` other images most similar to one of the split."""
        found = _top(self._images[row][None], self._images, count + 1)
        others = found.rows != row
        return Found(found.rows[others][:count], found.similarity[others][:count])

    def captions_for_image(self, row: int, count: int) -> Found:
        """Returns the `count` captions most similar to an image of the split."""
        return _top(self._images[row][None], self._captions, count)


def _top(query, gallery, count):
    rows, similarity = exact.nearest(gallery, query, count)
    return Found(rows[0], similarity[0])

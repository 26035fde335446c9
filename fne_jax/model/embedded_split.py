"""A split as a model embeds it, with all else that is known of it."""

from __future__ import annotations

import dataclasses
import functools

import ml_collections
import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.objectives.similarity_statistics import SimilarityStatistics

# Pairs whose embeddings are held at once.
_BLOCK_PAIRS = 16_384


@dataclasses.dataclass(frozen=True)
class EmbeddedSplit:
    """Embeddings of a split, what tells which belong together, and where they come from.

    Attributes:
      image_emb: [images, dim] float32, L2-normalised, in the split's order.
      text_emb: [captions, dim] float32, L2-normalised.
      caption_image: [captions] int row of each caption's image.
      image_id: [images] int ids of the images; COCO's own for COCO.
      caption_id: [captions] int ids of the captions; COCO's own for COCO.
      truth: [images, captions] bool, every true match, or None where it is not known.
      dataset: The split itself; None if only its embeddings are there.
      name: The name of the run, or of the folder of embeddings.
      split_name: `train`, `val` or `test`; "" if that is not known.
      step: The step of the run's checkpoint; None for embeddings of any other model.
      config: The resolved config of the run, or of the data.
      stats: The similarity statistics, on the host; None without them.
    """

    image_emb: np.ndarray
    text_emb: np.ndarray
    caption_image: np.ndarray
    image_id: np.ndarray
    caption_id: np.ndarray
    truth: np.ndarray | None = None
    dataset: PairDataset | None = None
    name: str = ""
    split_name: str = ""
    step: int | None = None
    config: ml_collections.ConfigDict | None = None
    stats: SimilarityStatistics | None = None

    @functools.cached_property
    def own_similarity(self) -> np.ndarray:
        """[captions] float32, of each caption to its own image."""
        return self.similarity(np.arange(len(self.text_emb)), self.caption_image)

    def similarity(self, caption: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Returns the [n] float32 cosines of [n] captions and [n] images."""
        found = np.empty(len(caption), np.float32)
        for start in range(0, len(caption), _BLOCK_PAIRS):
            part = slice(start, start + _BLOCK_PAIRS)
            rows = self.text_emb[caption[part]], self.image_emb[image[part]]
            found[part] = np.einsum("pd,pd->p", *rows)
        return found

    def part(self, images: np.ndarray, captions: np.ndarray) -> EmbeddedSplit:
        """Returns the embeddings of some rows of images and captions, in the order given.

        The images of the captions must be among the images.
        """
        new_row = np.full(len(self.image_emb), -1)
        new_row[images] = np.arange(len(images))
        return EmbeddedSplit(
            self.image_emb[images],
            self.text_emb[captions],
            new_row[self.caption_image[captions]],
            self.image_id[images],
            self.caption_id[captions],
            None if self.truth is None else self.truth[np.ix_(images, captions)],
        )

"""A split as embeddings: all that a protocol needs, wherever they come from."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class EmbeddedSplit:
    """Embeddings of a split with what tells which belong together.

    Attributes:
      image_emb: [images, dim] float32, L2-normalised, in the split's order.
      text_emb: [captions, dim] float32, L2-normalised.
      caption_image: [captions] int row of each caption's image.
      image_id: [images] int ids of the images; COCO's own for COCO.
      caption_id: [captions] int ids of the captions; COCO's own for COCO.
      truth: [images, captions] bool, every true match, or None where it is not known.
    """

    image_emb: np.ndarray
    text_emb: np.ndarray
    caption_image: np.ndarray
    image_id: np.ndarray
    caption_id: np.ndarray
    truth: np.ndarray | None = None

    def part(self, images: np.ndarray, captions: np.ndarray) -> EmbeddedSplit:
        """Returns the split of some rows of images and captions, in the order given.

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

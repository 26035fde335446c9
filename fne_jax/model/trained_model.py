"""A trained run as something that embeds pictures and sentences."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from fne_jax.errors import UserError
from fne_jax.training import run


class TrainedModel:
    """Embeds pictures and texts as a run's evaluation does; each tower is compiled once.

    Attributes:
      config: the run's config.
    """

    def __init__(self, restored: run.RestoredRun):
        self.config = restored.config
        self._restored = restored
        self._embedder = run.build_embedder(restored.config, restored.module, restored.mesh)

    def embed_images(self, images: Sequence[str | os.PathLike | np.ndarray]) -> np.ndarray:
        """Returns the [images, dim] float32 unit embeddings of pictures of any sizes.

        Args:
          images: paths of JPEG or PNG files, or uint8 arrays [height, width, 3].

        Raises:
          UserError: naming the picture that cannot be read.
        """
        from fne_jax.data.images import preprocessing

        size = self.config.encoder.image.image_size
        pixels = np.zeros((len(images), size, size, 3), np.uint8)
        for row, image in enumerate(images):
            if isinstance(image, np.ndarray):
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise UserError(
                        f"images[{row}]: expected uint8 [height, width, 3], "
                        f"got {image.dtype} {list(image.shape)}"
                    )
                pixels[row] = preprocessing.evaluation_image(image, size)
            else:
                pixels[row] = preprocessing.read_picture(pathlib.Path(image), size)
        return self._embedder.pixels(self._restored.params, pixels)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the [texts, dim] float32 unit embeddings of sentences.

        They are cleaned and cut to the run's length as its captions were.
        """
        tokens = run.tokenize_captions(
            self.config, self._restored.tokenizer, texts, self.config.evaluation.text_length
        )
        return self._embedder.texts(self._restored.params, tokens)


def load_workdir(workdir: str | os.PathLike, checkpoint: str = "best") -> TrainedModel:
    """Returns the model of a run, with its own preprocessing and tokenizer.

    Args:
      workdir: the run's folder.
      checkpoint: best, latest or a step.

    Raises:
      UserError: if the folder is not a run's, or the checkpoint is not there.
    """
    return TrainedModel(run.restore_run(pathlib.Path(workdir), checkpoint))

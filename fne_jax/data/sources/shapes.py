"""`shapes`: rendered scenes whose unlabelled matches are known."""

from __future__ import annotations

import dataclasses

import ml_collections
import numpy as np

from fne_jax.data.pairs import SPLITS
from fne_jax.data.sources import shapes_scenes as scenes
from fne_jax.data.sources.image_files import MadeImage
from fne_jax.data.sources.listing import ListedImage, Listing

_BYTES = 2000  # of a JPEG of these, roughly


@dataclasses.dataclass(frozen=True)
class _Scene(MadeImage):
    """The image of a scene, which is drawn when it is read."""

    vocabulary: scenes.Vocabulary
    # One generator an image, so that a larger dataset begins with a smaller one's images.
    seeds: tuple[int, int, int]

    def drawn(self) -> tuple[np.ndarray, list[str], np.ndarray, np.random.Generator]:
        """Returns the scene, its captions, their facts, and the generator for the image."""
        rng = np.random.default_rng(self.seeds)
        scene = scenes.random_scene(rng, self.vocabulary)
        return scene, *scenes.random_captions(rng, scene, self.vocabulary.facts), rng

    def read(self) -> bytes:
        scene, _, _, rng = self.drawn()
        return scenes.render_image(rng, scene)


def read_listing(settings: ml_collections.ConfigDict) -> Listing:
    """Returns the scenes that `config.data.shapes` describes; image ids count on over the splits.

    Args:
      settings: The group `config.data.shapes`, whose values can be.
    """
    vocabulary = scenes.Vocabulary(
        settings.shapes, settings.colours, settings.max_objects, settings.facts
    )
    sizes = (settings.train_images, settings.val_images, settings.test_images)
    images: list[ListedImage] = []
    for number, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
        for index in range(size):
            seeds = (settings.seed, number, index)
            image = _Scene(f"{seeds} {vocabulary}", _BYTES, vocabulary, seeds)
            scene, captions, facts, _ = image.drawn()
            first_id = len(images) * len(captions)
            images.append(
                ListedImage(
                    split=split,
                    path=image,
                    where=f"scene {index} of {split}",
                    image_id=len(images),
                    source_id=str(len(images)),
                    captions=captions,
                    caption_ids=range(first_id, first_id + len(captions)),
                    truth={"scene": scene.ravel().tolist(), "facts": facts.ravel().tolist()},
                )
            )
    return Listing("shapes", "", images)

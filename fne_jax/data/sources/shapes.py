"""`shapes`: a TFDS dataset of rendered scenes whose unlabelled matches are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from fne_jax.data.pairs import SPLITS
from fne_jax.data.preparation.storage import PairBuilder
from fne_jax.data.sources import shapes_scenes as scenes


def shapes_builder(settings: ml_collections.ConfigDict, cache: epath.Path) -> Shapes:
    """Returns the builder of the dataset that `config.data.shapes` describes.

    Args:
      settings: The group `config.data.shapes`, whose values can be.
      cache: The folder of prepared datasets.
    """
    words = (settings.shapes, settings.colours, settings.max_objects, settings.facts)
    sizes = (settings.train_images, settings.val_images, settings.test_images)
    config = ShapesConfig(seed=settings.seed, sizes=sizes, vocabulary=scenes.Vocabulary(*words))
    return Shapes(data_dir=cache, config=config)


@dataclasses.dataclass(kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
    """What the dataset depends on.

    Attributes:
      seed: The seed of the scenes, the captions and the images.
      sizes: The numbers of images in train, val and test.
      vocabulary: How varied the scenes are.
    """

    seed: int = 0
    sizes: tuple[int, int, int] = (10000, 500, 1000)
    vocabulary: scenes.Vocabulary = dataclasses.field(default_factory=scenes.Vocabulary)
    name: str = dataclasses.field(init=False)

    def __post_init__(self):
        words = self.vocabulary
        self.name = (
            f"s{self.seed}-n{'-'.join(map(str, self.sizes))}"
            f"-v{words.shapes}-{words.colours}-{words.max_objects}"
        )
        # Varied facts are not named: datasets were prepared before there were others.
        if words.facts != scenes.VARIED:
            self.name += f"-{words.facts}"


class Shapes(PairBuilder, skip_registration=True):
    """Renders the scenes of a `ShapesConfig`, the same at each build."""

    name = "shapes"
    builder_config: ShapesConfig

    def extra_features(self) -> dict[str, Any]:
        """Returns the scene of each image and the facts of each caption."""
        return {
            "scene": tfds.features.Tensor(
                shape=(scenes.MAX_OBJECTS, scenes.SCENE_FIELDS), dtype=np.int32
            ),
            "facts": tfds.features.Tensor(
                shape=(scenes.CAPTIONS_PER_IMAGE, scenes.FACT_FIELDS), dtype=np.int32
            ),
        }

    def known_truth(self, records: list[dict[str, Any]]) -> scenes.SceneTruth:
        """Returns the truth of a split from the scenes and the facts of its records."""
        return scenes.SceneTruth(
            scenes=np.stack([record["scene"] for record in records]),
            facts=np.concatenate([record["facts"] for record in records]),
        )

    def sizes(self) -> dict[str, int]:
        """Returns the numbers of images of train, val and test."""
        return dict(zip(SPLITS, self.builder_config.sizes, strict=True))

    def records(self, split: str, rows: range) -> Iterator[dict[str, Any]]:
        """Yields the records of a split's scenes; image ids count on from split to split."""
        config, number = self.builder_config, SPLITS.index(split)
        first_id = sum(config.sizes[:number])
        for index in rows:
            # One generator an image, so that a larger dataset begins with a smaller one's images.
            rng = np.random.default_rng([config.seed, number, index])
            scene = scenes.random_scene(rng, config.vocabulary)
            captions, facts = scenes.random_captions(rng, scene, config.vocabulary.facts)
            image_id = first_id + index
            yield {
                "image": scenes.render_image(rng, scene),
                "image_id": image_id,
                "captions": captions,
                "caption_ids": [image_id * len(captions) + i for i in range(len(captions))],
                "scene": scene,
                "facts": facts,
            }

"""The rendered dataset, by its settings."""

import numpy as np

from fne_jax.data.sources import shapes
from fne_jax.data.sources.registry import load_split
from fne_jax.data.sources.shapes_scenes import Vocabulary
from tests.support.tiny import tiny_config


def test_datasets_of_varied_facts_keep_the_name_that_they_were_prepared_under():
    assert shapes.ShapesConfig().name == "s0-n10000-500-1000-v5-7-3"
    four = shapes.ShapesConfig(vocabulary=Vocabulary(shapes=8, colours=3, facts="four"))
    assert four.name == "s0-n10000-500-1000-v8-3-3-four"


def test_four_facts_are_prepared_and_read_with_their_truth(tmp_path):
    config = tiny_config(
        data__source="shapes", data__cache_dir=str(tmp_path), data__shapes__facts="four",
        data__shapes__train_images=3, data__shapes__val_images=2, data__shapes__test_images=2,
    )  # fmt: skip
    split = load_split(config.data, 8, "train")
    assert len(split.captions) == 15
    assert ((split.truth.facts[:, :8] != -1).sum(axis=1) >= 3).all()
    assert (split.truth.scenes[:, :, 0] != -1).all()
    assert split.truth.is_true(np.arange(15), split.caption_image).all()

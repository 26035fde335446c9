"""The rendered dataset, by its settings."""

import numpy as np

from fne_jax.data.sources.registry import load_split
from tests.support.tiny import tiny_config


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

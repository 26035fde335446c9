"""Made-up pairs: captions that name their image's colour, ids of their own in each split."""

import numpy as np

from fne_jax.data.pairs import SPLITS
from fne_jax.data.sources.registry import load_split
from tests.support.tiny import tiny_config

LEVELS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


def test_captions_name_the_colour_of_their_image():
    split = load_split(tiny_config(data__synthetic__images=9).data, 6, "train")
    assert split.images.shape == (9, 6, 6, 3) and split.images.dtype == np.uint8
    assert split.caption_image.tolist() == np.repeat(range(9), 2).tolist()
    for caption, image in zip(split.captions, split.caption_image, strict=True):
        red, green, blue = (LEVELS.index(word) for word in caption.split()[1::2])
        assert caption.split()[::2] == ["red", "green", "blue"]
        # Noise stays within a level of 32.
        assert (split.images[image] // 32 == [red, green, blue]).all()


def test_splits_differ_and_repeat():
    config = tiny_config(data__synthetic__images=9)
    splits = [load_split(config.data, 4, split) for split in SPLITS]
    for name, count in (("image_id", 27), ("caption_id", 54)):
        ids = np.concatenate([getattr(split, name) for split in splits])
        assert len(set(ids.tolist())) == count
    assert not (splits[0].images == splits[1].images).all()
    np.testing.assert_array_equal(splits[0].images, load_split(config.data, 4, "train").images)
    config.data.synthetic.seed = 1
    assert not (splits[0].images == load_split(config.data, 4, "train").images).all()

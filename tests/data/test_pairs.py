"""Splits with some of their captions."""

import numpy as np

from fne_jax.data.pairs import PairDataset, with_captions_per_image


class TrueOfItself:
    """The truth of captions that are true of the image of their own number, modulo 3."""

    def __init__(self, numbers):
        self.numbers = np.asarray(numbers)

    def matrix(self):
        return np.arange(3)[:, None] == self.numbers % 3

    def is_true(self, caption, image):
        return self.matrix()[image, caption]

    def of_captions(self, rows):
        return TrueOfItself(self.numbers[rows])


def split_of(owners, truth=None):
    owners = np.array(owners, np.int32)
    return PairDataset(
        captions=[f"caption {n} of image {owner}" for n, owner in enumerate(owners)],
        caption_image=owners,
        image_id=np.arange(3, dtype=np.int32) + 10,
        images=np.zeros((3, 2, 2, 3), np.uint8),
        caption_id=np.arange(len(owners)) + 100,
        source_image_id=["a", "b", "c"],
        truth=truth,
    )


# The captions of an image lie apart, as in a table.
OWNERS = [0, 1, 0, 2, 0, 1, 0, 2, 2]


def test_all_captions_count_unless_a_number_is_given():
    dataset = split_of(OWNERS)
    assert with_captions_per_image(dataset, 0) is dataset


def test_the_first_captions_of_each_image_are_kept_in_order():
    dataset = split_of(OWNERS)
    two, three = with_captions_per_image(dataset, 2), with_captions_per_image(dataset, 3)
    assert two.caption_id.tolist() == [100, 101, 102, 103, 105, 107]
    assert two.caption_image.tolist() == [0, 1, 0, 2, 1, 2]
    assert two.captions == [dataset.captions[n] for n in (0, 1, 2, 3, 5, 7)]
    assert np.bincount(three.caption_image).tolist() == [3, 2, 3]
    assert three.caption_id.tolist() == [100, 101, 102, 103, 104, 105, 107, 108]
    for name in ("image_id", "images", "source_image_id"):
        assert getattr(two, name) is getattr(dataset, name)
    assert two.truth is None


def test_the_truth_stays_in_step():
    dataset = split_of(OWNERS, TrueOfItself(range(9)))
    two = with_captions_per_image(dataset, 2)
    kept = [0, 1, 2, 3, 5, 7]
    np.testing.assert_array_equal(two.truth.matrix(), dataset.truth.matrix()[:, kept])

"""A part of a split keeps what belongs together."""

import numpy as np

from fne_jax.model.embedded_split import EmbeddedSplit


def test_a_part_keeps_who_belongs_to_whom():
    rng = np.random.default_rng(0)
    owner, truth = np.array([0, 1, 2, 0, 3]), rng.random((4, 5)) < 0.5
    rows = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    split = EmbeddedSplit(*rows, owner, np.array([40, 41, 42, 43]), np.arange(50, 55), truth)
    part = split.part(np.array([3, 0]), np.array([4, 3, 0]))
    assert part.image_id[part.caption_image].tolist() == [43, 40, 40]
    assert part.caption_id.tolist() == [54, 53, 50]
    np.testing.assert_array_equal(part.image_emb, rows[0][[3, 0]])
    np.testing.assert_array_equal(part.text_emb, rows[1][[4, 3, 0]])
    np.testing.assert_array_equal(part.truth, truth[[3, 0]][:, [4, 3, 0]])

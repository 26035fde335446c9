"""The chance level is what random ranks come to."""

import numpy as np
import pytest

from fne_jax.evaluation.chance import chance_levels
from fne_jax.model.embedded_split import EmbeddedSplit


def test_chance_is_the_mean_over_random_ranks():
    rng = np.random.default_rng(0)
    owner = np.array([0, 0, 0, 1, 2, 3, 4, 4, 5, 6, 6, 6, 6])
    labels = owner == np.arange(7)[:, None]
    truth = labels | (rng.random((7, 13)) < 0.3)
    rows = np.zeros((7, 2)), np.zeros((13, 2))
    levels = chance_levels(EmbeddedSplit(*rows, owner, np.arange(7), np.arange(13), truth))
    expected = {}
    for source, matches in (("", labels), ("complete_", truth)):
        for direction, of_queries in (("i2t", matches), ("t2i", matches.T)):
            ranked = rng.permuted(np.repeat(of_queries[None], 4000, axis=0), axis=2)
            for first in (1, 5, 10):
                hit = ranked[:, :, :first].any(axis=2)
                expected[f"{source}{direction}_r{first}"] = 100 * hit.mean()
    expected["rsum"] = sum(value for name, value in expected.items() if "complete" not in name)
    assert levels == pytest.approx(expected, abs=1)
    assert levels["t2i_r1"] == pytest.approx(100 / 7)


def test_chance_of_flickr30k_s_test_split():
    owner = np.repeat(np.arange(1000), 5)
    split = EmbeddedSplit(np.zeros((1000, 1)), np.zeros((5000, 1)), owner, owner, owner)
    levels = chance_levels(split)
    assert levels["i2t_r1"] == pytest.approx(0.1) and levels["t2i_r5"] == pytest.approx(0.5)
    assert levels["rsum"] == pytest.approx(3.2, abs=0.02)

"""Chance levels are what random ranks come to, and the sentences tell what was measured."""

import numpy as np
import pytest

from fne_jax.evaluation.results import chance_levels, what_was_learnt
from fne_jax.model.embedded_split import EmbeddedSplit

RATES = {"sampled_false_negative_rate": 0.1, "hardest_false_negative_rate": 0.3}


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


def test_what_is_known_is_told():
    log = [
        {"loss": 9.0, "warmup": 1.0, "sampled_false_negative_rate": 0.9,
         "hardest_false_negative_rate": 0.9},
        {"loss": 2.0, "warmup": 0.0, **RATES},
        {"eval_rsum": 100.0},
        {"loss": 1.5, "warmup": 0.0, "sampled_false_negative_rate": 0.7},
        {"loss": 1.0, "sampled_false_negative_rate": 0.2, "hardest_false_negative_rate": 0.4},
    ]  # fmt: skip
    first, second, third = what_was_learnt({"t2i_r1": 28.8, "complete_t2i_r1": 57.9}, log, 1250)
    assert "among 1,250 in 28.8 %" in first and "in 0.08 %" in first
    assert "in 57.9 %" in second and "in 29.1 %" in second
    assert "15.0 % were in truth" in third and "35.0 %" in third


def test_without_the_truth():
    log = [
        {"loss": 5.0, "warmup": 1.0}, {"loss": 4.0, "warmup": 1.0}, {"eval_rsum": 9.0},
        {"loss": 2.0, "warmup": 0.4}, {"loss": 0.5, "warmup": 0.0}, {"loss": 0.25},
    ]  # fmt: skip
    _, second, third = what_was_learnt({"t2i_r1": 2.5}, log, 40)
    assert "nobody labelled" in second
    assert third == (
        "The loss went from 5.000 to 4.000 in the warm-up, and from 0.500 to 0.250 after it."
    )
    third = what_was_learnt({"t2i_r1": 2.5}, log[:4], 40)[2]
    assert third == "The loss went from 5.000 to 4.000 in the warm-up."
    third = what_was_learnt({"t2i_r1": 2.5}, log[4:], 40)[2]
    assert third == "The loss went from 0.500 to 0.250."
    assert "too few steps" in what_was_learnt({"t2i_r1": 2.5}, log[3:5], 40)[2]
    assert what_was_learnt({"t2i_r1": 100.0}, log, 1)[0].endswith("it would in 100 %.")

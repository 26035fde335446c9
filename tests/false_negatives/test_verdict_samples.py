"""Samples of pairs to judge: what is drawn how often, and what their weights say of all pairs."""

import doctest

import numpy as np
import pytest

from fne_jax.false_negatives import judged_split, verdict_samples
from fne_jax.false_negatives.verdict_samples import density, pooled, sample
from tests.support.planted import is_true, planted_split, unlabelled


@pytest.fixture
def few_hardest(monkeypatch):
    monkeypatch.setattr(judged_split, "HARDEST", 2)


def drawn_often(split, count, times):
    """Returns how often each pair was drawn, the weight it had last, and the samples."""
    often = np.zeros((len(split.text_emb), len(split.image_emb)))
    weight, samples = np.full(often.shape, np.nan), []
    for seed in range(times):
        one = sample(split, count, seed)
        often[one.caption, one.image] += 1
        weight[one.caption, one.image] = one.weight
        samples.append(one)
    return often, weight, samples


def test_pairs_are_drawn_as_often_as_their_weights_say(few_hardest):
    split, _ = planted_split(20, 2, topics=4)
    caption, image = unlabelled(split)
    times = 300
    often, weight, samples = drawn_often(split, 150, times)
    assert not often[np.arange(40), split.caption_image].any()
    for one in samples[:20]:
        assert len(set(zip(one.caption, one.image, strict=True))) == 150
        assert (one.weight >= 1).all()
    often, weight = often[caption, image], weight[caption, image]
    assert (often > 0).all()
    # Among pairs of one weight, how often they are drawn differs from each other by chance alone.
    groups, group = np.unique(np.round(weight, 9), return_inverse=True)
    for number, value in enumerate(groups):
        mean = often[group == number].mean() / times
        error = np.sqrt(1 / value / times / (group == number).sum())
        assert abs(mean - 1 / value) < 4 * error + 1e-12
    assert len(groups) > 5


def test_half_of_a_sample_is_among_the_hardest_and_half_even_over_the_strata():
    split, _ = planted_split(150, 3, topics=20)
    one = sample(split, 400, 0)
    hard = np.isin(one.caption * 150 + one.image, split.hardest)
    share = len(split.hardest) / split.unlabelled
    assert 0.5 < hard.mean() < 0.5 + 0.5 * (share + 0.6)
    # The strata: 0.6 of the pairs that least speaks for get an eleventh of the even half.
    heavy = one.weight > 0.6 * split.unlabelled / (0.5 * 400 / 11) * 0.5
    assert 0.02 < heavy.mean() < 0.12


@pytest.mark.parametrize("pool", [10**6, 100])
def test_the_density_is_unbiased(few_hardest, monkeypatch, pool):
    """Whether all the other pairs are looked at, or a random part of them."""
    monkeypatch.setattr(verdict_samples, "_POOL", pool)
    split, topic = planted_split(24, 2, topics=5, noise=1.2)
    true = is_true(split, topic, *unlabelled(split)).mean()
    *_, samples = drawn_often(split, 50, 400)
    totals, shares, inside = [], [], 0
    for one in samples:
        match = is_true(split, topic, one.caption, one.image)
        totals.append((one.weight * match).sum() / split.unlabelled)
        found = density(match, one.weight)
        shares.append(found.value)
        inside += found.low <= true <= found.high
    for values in (totals, shares):
        error = np.std(values) / np.sqrt(len(values))
        assert error < 0.01 and abs(np.mean(values) - true) < 3.5 * error
    assert 0.9 < inside / len(samples) <= 1


def strata(pairs, each, dense):
    """Returns the cells of as many pairs, how many each stands for, and how often they match.

    As of configs/shapes.py, from what most speaks for a match to what least does. Most matches lie
    where some 5 of 200 verdicts fall, of which each stands for thousands of pairs.
    """
    mass = np.array([0.006, 0.004, 0.0067, 0.0112, 0.0187, 0.031, 0.052, 0.0864, 0.144, 0.24, 0.4])
    rate = np.array([0.31, 0.2, 0.15, 0.1, 0.072, 0.067, 0.06, 0.033, 0.012, 0.002, 0.0])
    number = np.round(pairs * mass / mass.sum()).astype(int)
    hardest = np.round(number * 0.5 ** np.arange(11)).astype(int)
    cell = np.repeat(np.arange(22), np.stack([number - hardest, hardest], axis=1).ravel())
    return cell, np.where(cell % 2, 1.0, each), dense * rate[cell // 2]


def simulate(strata_of, verdicts, times):
    """Returns the density's relative bias, and how often its interval holds the truth.

    Args:
      strata_of: What `strata` returned.
      verdicts: How many verdicts were given of each of several samples of 1,000 pairs.
      times: How often the samples are drawn.
    """
    cell, stands_for, rate = strata_of
    is_match = np.random.default_rng(0).random(len(cell)) < rate
    true, inside, means = np.average(is_match, weights=stands_for), 0, []
    share, total = verdict_samples._shares(cell, stands_for), stands_for.sum()
    for time in range(times):
        rows, weights = [], []
        for number, first in enumerate(verdicts):
            rng = np.random.default_rng([time, number])
            drawn, probability = verdict_samples._draw(cell, share, 1000, rng)
            weight = (stands_for[drawn] / probability)[:first]
            rows.append(drawn[:first])
            weights.append(weight * total / weight.sum())
        sample = np.repeat(np.arange(len(verdicts)), verdicts)
        row, weight = np.concatenate(rows), np.concatenate(weights)
        found = density(is_match[row], weight, sample)
        inside += found.low <= true <= found.high
        # By the rates instead of the matches, so that chance hardly hides a bias.
        means.append(np.average(rate[row], weights=pooled(weight, sample)))
    return np.mean(means) / np.average(rate, weights=stands_for) - 1, inside / times


@pytest.mark.parametrize("verdicts", [[100], [200], [1000], [500, 500], [800, 200]])
@pytest.mark.parametrize(
    ("pairs", "each", "dense", "times"),
    [
        (6000, 1, 1, 200),
        *(pytest.param(*one, 1500, marks=pytest.mark.slow)
          for one in ((6000, 1, 1), (6000, 1, 3), (30_000, 30, 1), (30_000, 30, 3))),
    ],
)  # fmt: skip
def test_a_density_holds_wherever_one_stops(verdicts, pairs, each, dense, times):
    bias, inside = simulate(strata(pairs, each, dense), verdicts, times)
    assert abs(bias) < 0.01
    # Of few verdicts, which may all have missed a heavy stratum's matches, it is wide.
    chance = 3.5 * np.sqrt(0.05 * 0.95 / times)
    assert 0.945 - chance < inside < 0.96 + chance + (0.04 if sum(verdicts) <= 200 else 0)


def test_more_than_there_are(few_hardest):
    split, topic = planted_split(6, 2, topics=2)
    one = sample(split, 10**6, 0)
    caption, image = unlabelled(split)
    assert set(zip(one.caption, one.image, strict=True)) == set(zip(caption, image, strict=True))
    np.testing.assert_array_equal(one.weight, 1)
    again = sample(split, 10**6, 0)
    np.testing.assert_array_equal(one.caption, again.caption)
    assert (sample(split, 10**6, 1).caption != one.caption).any()
    found = density(is_true(split, topic, one.caption, one.image), one.weight)
    assert found.value == pytest.approx(is_true(split, topic, caption, image).mean())


def test_the_density_of_verdicts_that_all_agree():
    none = density(np.zeros(100, bool), np.ones(100))
    assert none.value == none.low == 0
    assert none.high == pytest.approx(1 - 0.05 ** (1 / 100))
    uneven = density(np.zeros(100, bool), np.append(np.ones(99), 99))
    assert uneven.high > 0.3  # half of the pairs are known by one verdict
    everything = density(np.ones(50, bool), np.ones(50))
    assert everything.value == everything.high == 1 and 0.9 < everything.low < 0.95


def test_the_example_runs():
    result = doctest.testmod(verdict_samples)
    assert result.attempted and not result.failed

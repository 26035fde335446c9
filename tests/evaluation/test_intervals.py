"""Intervals against a plain bootstrap, and against what is known of a proportion."""

import math

import numpy as np
import pytest

from fne_jax.evaluation import intervals
from fne_jax.evaluation.metrics import QueryScores, rank_scores


def test_each_resample_is_the_metrics_of_the_drawn_images(monkeypatch):
    rng = np.random.default_rng(0)
    image = np.array([7, 2, 2, 5, 7, 7, 9])  # uneven numbers of captions; an image without
    ranks = rng.integers(0, 12, 7)
    drawn = []
    sample = intervals._sample_images
    monkeypatch.setattr(
        intervals, "_sample_images", lambda *a: drawn.append(sample(*a)) or drawn[-1]
    )
    samples = intervals.resampled(rank_scores(ranks, image, 12))
    weights = np.concatenate(drawn)
    assert weights.shape == (intervals.RESAMPLES, 4) and (weights.sum(axis=1) == 4).all()
    for resample in (0, 63, 64, 999):
        times = dict(zip([2, 5, 7, 9], weights[resample], strict=True))
        queries = [q for q in range(7) for _ in range(times[image[q]])]
        expected = rank_scores(ranks[queries], image[queries], 12).metrics()
        found = {name: values[resample] for name, values in samples.items()}
        assert found == pytest.approx(expected)


def test_an_interval_holds_the_middle_of_a_proportion():
    hits = np.arange(400) < 100
    scores = QueryScores({"r1": 100.0 * hits}, None, np.arange(400), 400)
    low, high = intervals.interval(25.0, intervals.resampled(scores)["r1"], 100.0, 400)
    width = 1.96 * 100 * np.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(25 - width, abs=0.7) and high == pytest.approx(25 + width, abs=0.7)


@pytest.mark.parametrize("true", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("queries", [20, 60])
def test_an_interval_of_few_queries_holds_the_truth(queries, true):
    inside = 0.0
    for right in range(queries + 1):
        value = 100 * right / queries
        samples = value + np.sqrt(value * (100 - value) / queries) * np.array([-1, 1])
        low, high = intervals.interval(value, samples, 100.0, queries)
        assert 0 <= low <= value <= high <= 100 and high - low > 1
        chance = math.comb(queries, right) * true**right * (1 - true) ** (queries - right)
        inside += chance * (low <= 100 * true <= high)
    assert 0.92 < inside < 0.985


def test_captions_of_an_image_are_drawn_together():
    hits = np.repeat(np.arange(80) % 2, 5)  # all five captions of an image hit or miss
    together = QueryScores({"r1": hits}, None, np.repeat(np.arange(80), 5), 80)
    single = QueryScores({"r1": hits}, None, np.arange(400), 80)
    deviation = [intervals.resampled(scores)["r1"].std() for scores in (together, single)]
    assert deviation[0] == pytest.approx(np.sqrt(5) * deviation[1], rel=0.1)


def test_draws_repeat_and_folds_differ():
    scores = rank_scores(np.arange(30), np.arange(30), 30)
    first, again, other = (intervals.resampled(scores, stream) for stream in (0, 0, 1))
    np.testing.assert_array_equal(first["medr"], again["medr"])
    assert (first["meanr"] != other["meanr"]).any()

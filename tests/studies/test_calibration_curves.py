"""What verdicts tell of a split with planted matches, against what is planted."""

import math

import numpy as np
import pytest

from fne_jax.false_negatives import verdict_samples
from fne_jax.false_negatives.verdict_samples import Density
from fne_jax.studies import calibration_curves
from fne_jax.studies.calibration_curves import Calibration, OfRun, markdown, of_split
from tests.support.planted import is_true, planted_split, unlabelled


@pytest.fixture(scope="module")
def planted():
    return planted_split(60, 3, topics=6, noise=1.2)


@pytest.fixture(scope="module")
def told(planted):
    split, topic = planted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_curves, "_PAIRS", 20_000)
        return of_split(split, lambda *pair: is_true(split, topic, *pair), (8, 60, 600), seed=1)


def test_what_is_so_is_that_of_all_pairs(planted, told):
    split, topic = planted
    caption, image = unlabelled(split)
    assert abs(told.density - is_true(split, topic, caption, image).mean()) < 0.01


def test_each_number_of_verdicts_tells_what_the_first_of_a_sample_do(planted, told):
    split, topic = planted
    for number in range(calibration_curves.SAMPLES):
        drawn = verdict_samples.sample(split, 600, calibration_curves.SAMPLES + number)
        first = slice(60)
        judged = is_true(split, topic, drawn.caption[first], drawn.image[first])
        expected = verdict_samples.density(judged, drawn.weight[first])
        assert told.told[60][number].density == expected
    errors = [
        np.mean([abs(one.density.value - told.density) for one in told.told[budget]])
        for budget in (8, 600)
    ]
    assert errors[1] < errors[0]


def test_more_verdicts_make_a_better_detector_than_similarity(told):
    assert all(math.isnan(one.at_recall) for one in told.told[8])
    many = [one.at_recall for one in told.told[600]]
    assert min(many) > told.by_similarity + 0.05
    assert all(0.65 < one.delivered <= 1 for one in told.told[600])


def test_the_table_tells_seeds_and_samples_apart():
    def calibration(value, precision):
        return Calibration(Density(value, value - 0.005, value + 0.005, 9), precision, precision)

    def run(shift):
        few = [calibration(0.03, math.nan)] * 3
        many = [calibration(0.03 + shift * one, 0.8 + shift * one) for one in (-1, 0, 4)]
        return OfRun(0.032, 0.5 + shift, {9: few, 90: many})

    lines = markdown([run(0.0), run(0.01)]).splitlines()
    assert lines[0].endswith("over 2 seeds,") and lines[2].startswith("3.2 ± 0.0 % of unlabelled")
    none, few, many = lines[-3:]
    assert none == "| none (similarity) | | | 50.5 ± 0.7 % | |"
    assert few == "| 9 | 3.0 ± 0.0 % | 6 of 6 | - | - |"
    assert many == "| 90 | 3.5 ± 0.7 % | 4 of 6 | 80.5 ± 0.7 % | 79 to 84 % |"
    assert "± " not in markdown([run(0.0)]).splitlines()[-1]

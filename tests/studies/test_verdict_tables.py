"""What verdicts tell of systems, and of a split with planted matches, against what is so."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from fne_jax.false_negatives import verdict_samples
from fne_jax.false_negatives.verdict_samples import Density
from fne_jax.model.embedded_split import EmbeddedSplit
from tests.support import verdict_tables
from tests.support.embeddings import unit_rows
from tests.support.planted import is_true, planted_split, unlabelled
from tests.support.verdict_tables import (
    Calibration,
    FirstResults,
    OfRun,
    calibration_table,
    first_results,
    of_split,
    ranked_rightly,
    ranking_table,
)


def systems(count=3, images=7, captions=11):
    rng = np.random.default_rng(0)
    owner = np.arange(captions) % images
    truth = rng.random((images, captions)) < 0.4
    truth[owner, np.arange(captions)] = True
    ids = np.arange(images), np.arange(captions)
    return [
        EmbeddedSplit(unit_rows(rng, images, 4), unit_rows(rng, captions, 4), owner, *ids, truth)
        for _ in range(count)
    ]


def test_first_results_against_a_plain_version():
    splits = systems()
    found = first_results(splits)
    for number, split in enumerate(splits):
        similarity = split.image_emb @ split.text_emb.T
        i2t = [(image, row.argmax()) for image, row in enumerate(similarity)]
        t2i = [(row.argmax(), caption) for caption, row in enumerate(similarity.T)]
        for direction, pairs in (("i2t", i2t), ("t2i", t2i)):
            of = found[direction]
            for query, (image, caption) in enumerate(pairs):
                assert of.pair[number, query] == caption * 7 + image
                assert of.is_true[number, query] == split.truth[image, caption]
                assert of.labelled[number, query] == (split.caption_image[caption] == image)


def test_all_verdicts_order_all_systems_and_few_do_not():
    rng = np.random.default_rng(1)
    quality = np.array([0.3, 0.5, 0.52, 0.9])
    is_true = rng.random((4, 2000)) < quality[:, None]
    results = FirstResults(np.arange(8000).reshape(4, 2000), is_true, np.zeros((4, 2000), bool))
    assert ranked_rightly(results, 8000, 0) == (1.0, 2000.0)
    shares = [ranked_rightly(results, verdicts, 0)[0] for verdicts in (8, 80, 800)]
    assert 0.6 < shares[0] < shares[1] < shares[2] < 1.0
    assert ranked_rightly(results, 80, 0)[1] == 20


def test_shared_and_labelled_results_cost_one_verdict_and_none(monkeypatch):
    monkeypatch.setattr(verdict_tables, "_ORDERS", 3)
    same = np.tile(np.arange(50), (3, 1))
    is_true = np.zeros((3, 50), bool)
    is_true[1, :10], is_true[2, :20] = True, True
    labelled = np.zeros((3, 50), bool)
    results = FirstResults(same, is_true, labelled)
    assert ranked_rightly(results, 50, 0) == (1.0, 50.0)
    assert ranked_rightly(results, 7, 0)[1] == 7
    labelled[:, ::2] = True
    assert ranked_rightly(results, 25, 0) == (1.0, 50.0)


def test_systems_that_are_equal_are_left_out_and_ties_count_half():
    is_true = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    results = FirstResults(np.arange(12).reshape(3, 4), is_true, np.zeros((3, 4), bool))
    found, _ = ranked_rightly(results, 6, 0)  # two queries; the third tells, in half of the draws
    orders = list(itertools.combinations(range(4), 2))
    expected = np.mean([1.0 if 2 in two else 0.5 for two in orders])
    assert found == pytest.approx(expected, abs=0.05)


def test_systems_that_nothing_tells_apart_are_ordered_by_nothing():
    same = np.ones((2, 4), bool)
    results = FirstResults(np.arange(8).reshape(2, 4), same, ~same)
    assert np.isnan(ranked_rightly(results, 8, 0)).all()


def test_the_table_names_its_systems_and_draws():
    of_seeds = {0: systems(), 1: [dataclasses.replace(one) for one in systems()]}
    text = ranking_table(of_seeds, [3, 1000])
    assert text.startswith("Pairs of 3 systems") and "over 2 seeds" in text
    assert "| 1,000 | 100 ± 0 % | 7 | 100 ± 0 % | 11 |" in text


@pytest.fixture(scope="module")
def planted():
    return planted_split(60, 3, topics=6, noise=1.2)


@pytest.fixture(scope="module")
def told(planted):
    split, topic = planted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict_tables, "_PAIRS", 20_000)
        return of_split(split, lambda *pair: is_true(split, topic, *pair), (8, 60, 600), seed=1)


def test_what_is_so_is_that_of_all_pairs(planted, told):
    split, topic = planted
    caption, image = unlabelled(split)
    assert abs(told.density - is_true(split, topic, caption, image).mean()) < 0.01


def test_each_number_of_verdicts_tells_what_the_first_of_a_sample_do(planted, told):
    split, topic = planted
    for number in range(verdict_tables.SAMPLES):
        drawn = verdict_samples.sample(split, 600, verdict_tables.SAMPLES + number)
        first = slice(60)
        judged = is_true(split, topic, drawn.caption[first], drawn.image[first])
        # A tenth of the verdicts stand for all pairs: each for ten times as many.
        expected = verdict_samples.density(judged, drawn.weight[first] * 600 / 60)
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

    lines = calibration_table([run(0.0), run(0.01)]).splitlines()
    assert lines[0].endswith("over 2 seeds,") and lines[2].startswith("3.2 ± 0.0 % of unlabelled")
    none, few, many = lines[-3:]
    assert none == "| none (similarity) | | | 50.5 ± 0.7 % | |"
    assert few == "| 9 | 3.0 ± 0.0 % | 6 of 6 | - | - |"
    assert many == "| 90 | 3.5 ± 0.7 % | 4 of 6 | 80.5 ± 0.7 % | 79 to 84 % |"
    assert "± " not in calibration_table([run(0.0)]).splitlines()[-1]

import dataclasses
import itertools

import numpy as np
import pytest

from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.studies import verdict_curves
from fne_jax.studies.verdict_curves import Outcomes, ordered_rightly, outcomes
from tests.support.embeddings import unit_rows


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
    found = outcomes(splits)
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
    results = Outcomes(np.arange(8000).reshape(4, 2000), is_true, np.zeros((4, 2000), bool))
    assert ordered_rightly(results, 8000, 0) == (1.0, 2000.0)
    shares = [ordered_rightly(results, verdicts, 0)[0] for verdicts in (8, 80, 800)]
    assert 0.6 < shares[0] < shares[1] < shares[2] < 1.0
    assert ordered_rightly(results, 80, 0)[1] == 20


def test_shared_and_labelled_results_cost_one_verdict_and_none(monkeypatch):
    monkeypatch.setattr(verdict_curves, "_ORDERS", 3)
    same = np.tile(np.arange(50), (3, 1))
    is_true = np.zeros((3, 50), bool)
    is_true[1, :10], is_true[2, :20] = True, True
    labelled = np.zeros((3, 50), bool)
    results = Outcomes(same, is_true, labelled)
    assert ordered_rightly(results, 50, 0) == (1.0, 50.0)
    assert ordered_rightly(results, 7, 0)[1] == 7
    labelled[:, ::2] = True
    assert ordered_rightly(results, 25, 0) == (1.0, 50.0)


def test_systems_that_are_equal_are_left_out_and_ties_count_half():
    is_true = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    results = Outcomes(np.arange(12).reshape(3, 4), is_true, np.zeros((3, 4), bool))
    found, _ = ordered_rightly(results, 6, 0)  # two queries; the third tells, in half of the draws
    orders = list(itertools.combinations(range(4), 2))
    expected = np.mean([1.0 if 2 in two else 0.5 for two in orders])
    assert found == pytest.approx(expected, abs=0.05)


def test_systems_that_nothing_tells_apart_are_ordered_by_nothing():
    same = np.ones((2, 4), bool)
    results = Outcomes(np.arange(8).reshape(2, 4), same, ~same)
    assert np.isnan(ordered_rightly(results, 8, 0)).all()


def test_the_table_names_its_systems_and_draws():
    of_seeds = {0: systems(), 1: [dataclasses.replace(one) for one in systems()]}
    text = verdict_curves.markdown(of_seeds, [3, 1000])
    assert text.startswith("Pairs of 3 systems") and "over 2 seeds" in text
    assert "| 1,000 | 100 ± 0 % | 7 | 100 ± 0 % | 11 |" in text

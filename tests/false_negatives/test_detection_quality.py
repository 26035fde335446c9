"""What is said of detectors equals plain counting, and scikit-learn's."""

import numpy as np
import pytest
from sklearn import metrics

from fne_jax.false_negatives import detection_quality
from fne_jax.model.embedded_split import EmbeddedSplit
from tests.support.embeddings import unit_rows


def some(seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.random(300) < 0.2
    probability = np.round(np.clip(rng.normal(0.3 + 0.2 * truth, 0.2), 0, 1), 2)
    return probability.astype(np.float32), truth


@pytest.mark.parametrize("seed", range(3))
def test_rankings_against_scikit_learn_and_plain_counting(seed):
    probability, truth = some(seed)
    scores = detection_quality.ranking_scores(probability, truth)
    assert scores["roc_auc"] == pytest.approx(metrics.roc_auc_score(truth, probability))
    assert scores["average_precision"] == pytest.approx(
        metrics.average_precision_score(truth, probability)
    )
    for least in sorted(set(probability), reverse=True):
        found = probability >= least
        if truth[found].sum() >= 0.3 * truth.sum():
            break
    assert scores["precision_at_recall_0.3"] == pytest.approx(truth[found].mean())
    assert set(detection_quality.ranking_scores(probability, truth & False).values()) == {None}


def test_calibration_counts_tenths():
    probability, truth = some()
    scores = detection_quality.detection_scores(probability, truth, -probability)
    assert sum(count for _, _, count in scores["calibration"]) == 300
    mean, share, count = scores["calibration"][2]
    inside = (probability >= np.float32(0.2)) & (probability < np.float32(0.3))
    assert count == inside.sum()
    assert mean == pytest.approx(probability[inside].mean())
    assert share == pytest.approx(truth[inside].mean())
    assert scores["density"] == truth.mean()
    # The ranking is the score's.
    assert scores["roc_auc"] == pytest.approx(1 - metrics.roc_auc_score(truth, probability))


def test_quality_is_that_of_each_querys_hardest(monkeypatch):
    monkeypatch.setattr(detection_quality, "QUERIES", 6)
    monkeypatch.setattr(detection_quality, "HARDEST", (1, 4))
    rng = np.random.default_rng(2)
    image_emb, text_emb, owner = unit_rows(rng, 8, 5), unit_rows(rng, 24, 5), np.arange(24) % 8
    truth = rng.random((8, 24)) < 0.4
    asked = []

    def judge(pairs):
        asked.append(pairs)
        return pairs.replace(probability=np.clip(pairs.similarity, 0, 1), score=pairs.similarity)

    split = EmbeddedSplit(image_emb, text_emb, owner, np.arange(8), np.arange(24))
    candidates = detection_quality.split_candidates(split, seed=0)
    found = detection_quality.quality(
        {"mine": judge}, candidates, lambda caption, image: truth[image, caption]
    )["mine"]
    assert list(found) == ["i2t_hardest_1", "i2t_hardest_4", "t2i_hardest_1", "t2i_hardest_4"]
    for pairs, scores in zip(asked, found.values(), strict=True):
        assert (owner[pairs.caption] != pairs.image).all()
        expected = np.einsum("pd,pd->p", image_emb[pairs.image], text_emb[pairs.caption])
        np.testing.assert_allclose(pairs.similarity, expected, atol=1e-6)
        right = truth[pairs.image, pairs.caption]
        assert scores["density"] == pytest.approx(right.mean())
    assert [len(pairs.caption) for pairs in asked] == [6, 24, 6, 24]
    # Images ask in the first two, captions in the others.
    assert len(set(asked[1].image)) == 6 and len(set(asked[3].caption)) == 6
    assert found["i2t_hardest_4"]["roc_auc"] == pytest.approx(
        metrics.roc_auc_score(truth[asked[1].image, asked[1].caption], asked[1].similarity)
    )

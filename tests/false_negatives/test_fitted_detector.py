"""The detector fitted to verdicts: its trees, its probabilities, its thresholds, its file."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from fne_jax.errors import UserError
from fne_jax.false_negatives import fitted_detector
from fne_jax.false_negatives.detection_quality import ranking_scores
from fne_jax.false_negatives.fitted_detector import FEATURES, Trees, fit, read, write
from fne_jax.false_negatives.pair_features import features
from fne_jax.false_negatives.verdict_samples import sample
from tests.support.planted import is_true, planted_split, unlabelled


@pytest.fixture(scope="module")
def judged():
    """A split, the features and the truth of all its unlabelled pairs, and a sample of them."""
    split, topic = planted_split(120, 3, topics=25, noise=1.0)
    pairs = unlabelled(split)
    drawn = sample(split, 500, 0)
    return {
        "table": features(split, *pairs),
        "truth": is_true(split, topic, *pairs),
        "sampled": (
            features(split, drawn.caption, drawn.image),
            is_true(split, topic, drawn.caption, drawn.image),
            drawn.weight,
        ),
    }


@pytest.fixture(scope="module")
def detector(judged):
    return fit(*judged["sampled"], seed=0, about={"run": "shapes", "step": 780})


@pytest.mark.parametrize("leaves", [2, 5, 8])
def test_trees_are_those_of_scikit_learn(monkeypatch, leaves):
    monkeypatch.setattr(fitted_detector, "_BLOCK_PAIRS", 300)
    rng = np.random.default_rng(leaves)
    # Rounded, so that values meet thresholds.
    table = np.round(rng.normal(size=(1000, 4)), 1).astype(np.float32)
    is_match = table[:, 0] * table[:, 1] + 0.5 * rng.normal(size=1000) > 0.3
    model = HistGradientBoostingClassifier(max_leaf_nodes=leaves, max_iter=30, max_depth=6)
    model.fit(table, is_match)
    found = Trees.of(model).log_odds(table)
    np.testing.assert_allclose(found, model.decision_function(table), atol=1e-9)
    assert found.std() > 0.1


def test_it_finds_more_than_similarity_alone(judged, detector):
    probability, truth = detector.probability(judged["table"]), judged["truth"]
    assert probability.dtype == np.float32 and ((probability >= 0) & (probability <= 1)).all()
    fitted = ranking_scores(probability, truth)["average_precision"]
    alone = ranking_scores(judged["table"][:, 0], truth)["average_precision"]
    assert fitted > 0.9 > alone + 0.2
    assert probability.mean() == pytest.approx(truth.mean(), rel=0.35)
    assert detector.about["verdicts"] == 500 and detector.about["run"] == "shapes"
    assert detector.about["matches"] == judged["sampled"][1].sum()


def test_what_speaks_for_a_match_never_lowers_it(judged, detector):
    table = judged["table"][::97]
    before = detector.log_odds(table)
    for column, sign in enumerate(FEATURES.values()):
        more = table.copy()
        more[:, column] += 0.3
        change = detector.log_odds(more) - before
        assert sign == 0 or (sign * change >= 0).all()


def test_thresholds_keep_their_precision(judged, detector):
    probability, truth = detector.probability(judged["table"]), judged["truth"]
    for precision in (0.5, 0.9):
        above = probability >= detector.threshold(precision)
        assert truth[above].mean() > precision - 0.15 and truth[above].sum() > 0.3 * truth.sum()
    assert detector.threshold(0.5) < detector.threshold(0.9)
    # Of the ten verdicts at 0.5 the first five are matches.
    least, right = np.repeat([0.9, 0.5], 10), np.minimum(np.arange(1, 21), 15)
    tied = dataclasses.replace(detector, least=least, precision=right / np.arange(1, 21))
    assert tied.threshold(0.9) == 0.9 and tied.threshold(0.7) == 0.5
    with pytest.raises(UserError, match=r"a precision of \d\.\d+ at most, not 1\.1; ask"):
        detector.threshold(1.1)


def test_the_table_of_precision_is_that_of_a_plain_version():
    least = np.array([0.9, 0.8, 0.4, 0.1])
    is_match, weight = np.array([True, False, True, False]), np.array([1.0, 3.0, 2.0, 10.0])
    shuffled = np.array([2, 0, 3, 1])
    found = fitted_detector._precision_and_recall(
        least[shuffled], is_match[shuffled], weight[shuffled]
    )
    np.testing.assert_allclose(found, [least, [1, 1 / 4, 3 / 6, 3 / 16], [1 / 3, 1 / 3, 1, 1]])


def test_verdicts_that_no_sample_drew_are_fitted_to_but_not_measured_by(judged, detector):
    table, is_match, weight = judged["sampled"]
    # As many verdicts of a picked kind: they would make the detector look far better.
    picked = np.flatnonzero(judged["table"][:, 0] > 0.7)[:200]
    more = fit(
        np.concatenate([table, judged["table"][picked]]),
        np.append(is_match, judged["truth"][picked]),
        np.append(weight, np.full(len(picked), np.nan)),
        seed=0,
    )
    assert more.about["drawn"] == len(more.least) == 500
    assert more.about["verdicts"] == 500 + len(picked) > 500
    assert (more.trees.value != detector.trees.value).any()


def test_the_calibration_is_the_likeliest():
    rng = np.random.default_rng(0)
    log_odds, weight = rng.normal(-1, 2, 20_000), rng.integers(1, 5, 20_000)
    is_match = rng.random(20_000) < 1 / (1 + np.exp(-(0.5 * log_odds - 0.7)))
    slope, offset = fitted_detector._calibration(log_odds, is_match, weight)
    assert slope == pytest.approx(0.5, abs=0.03) and offset == pytest.approx(-0.7, abs=0.05)


def test_a_detector_comes_back_as_it_was(judged, detector, tmp_path):
    write(tmp_path / "fitted.json", detector)
    again = read(tmp_path / "fitted.json")
    np.testing.assert_array_equal(
        again.probability(judged["table"]), detector.probability(judged["table"])
    )
    assert again.threshold(0.8) == detector.threshold(0.8)
    assert (again.about, again.log_loss) == (detector.about, detector.log_loss)
    assert again.about["step"] == 780
    assert [one.name for one in tmp_path.iterdir()] == ["fitted.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fne_jax fitted detector 0"}, "no format 'fne_jax fitted detector 1'"),
        ({"features": ["similarity"]}, "fit it again"),
        ({"slope": None}, "float\\(\\) argument"),
        ({"value": [[0.0]]}, r"value is of the shape \[1, 1\]"),
        ({"feature": [[99] * 7] * 150}, "feature 99"),
        ({"least": ["x"]}, "could not convert"),
        ({"threshold": [[0.5] * 7]}, r"threshold is of the shape \[1, 7\]"),
        ({"threshold": [[float("nan")] * 7] * 150}, "slope or threshold is out of its range"),
        ({"precision": [0.5]}, r"precision is of the shape \[1\]"),
        ({"recall": 0.5}, r"recall is of the shape \[\]"),
        ({"slope": float("nan")}, "slope holds a non-finite number"),
        ({"slope": -1.0}, "slope or threshold is out of its range"),
        ({"offset": float("inf")}, "offset holds a non-finite number"),
    ],
)
def test_a_damaged_file_is_told(detector, tmp_path, change, message):
    path = tmp_path / "fitted.json"
    write(path, detector)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: not a fitted detector")


def test_files_that_are_none(tmp_path, detector):
    (tmp_path / "a.json").write_text("{")
    for name, message in (("a.json", "not a fitted detector"), ("b.json", "cannot be read")):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read(tmp_path / name)
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "none" / "a.json", detector)


def test_too_few_verdicts(judged, detector):
    table, is_match, weight = judged["sampled"]
    few = np.flatnonzero(is_match)[19:]
    kept = np.setdiff1d(np.arange(500), few)
    with pytest.raises(UserError, match=r"19 matches among \d+ verdicts"):
        fit(table[kept], is_match[kept], weight[kept], 0)
    with pytest.raises(UserError, match="0 matches among 0 verdicts on random samples, 500 in all"):
        fit(table, is_match, np.full(500, np.nan), 0)
    with pytest.raises(ValueError, match="n verdicts and n weights"):
        fit(table, is_match, weight[:-1], 0)
    with pytest.raises(ValueError, match=r"expected \[n, 11\]"):
        detector.probability(table[:, :-1])

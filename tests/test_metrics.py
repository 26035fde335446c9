"""Metrics against plain definitions, ties, uneven captions and bad input."""

import numpy as np
import pytest

from fne_jax import retrieval_metrics
from fne_jax.retrieval import metrics, ranked_lists, ranks
from fne_jax.retrieval.evaluation import format_table


def unit(rng, rows, dim=6):
    vectors = rng.normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_any_number_of_captions_an_image_in_any_order():
    rng = np.random.default_rng(0)
    image, text = unit(rng, 9), unit(rng, 31)
    owner = np.concatenate([np.arange(9), rng.integers(0, 9, 22)])
    scores = retrieval_metrics(image, text, owner)
    similarity = image @ text.T
    ranks = [
        min(sorted(-similarity[i]).index(-similarity[i, j]) for j in np.flatnonzero(owner == i))
        for i in range(9)
    ]
    assert scores["i2t_r5"] == pytest.approx(100 * np.mean([r < 5 for r in ranks]))
    # Captions of the same image that rank before the best do not exist; others do count.
    t2i = [sorted(-similarity[:, j]).index(-similarity[owner[j], j]) for j in range(31)]
    assert scores["t2i_r1"] == pytest.approx(100 * np.mean([r < 1 for r in t2i]))
    assert scores["t2i_meanr"] == pytest.approx(np.mean(t2i) + 1)
    assert scores["t2i_medr"] == np.floor(np.median(t2i)) + 1


def test_ties_count_against_the_model():
    same = np.tile(np.array([[0.6, 0.8]], np.float32), (20, 1))
    scores = retrieval_metrics(same, same, np.arange(20))
    assert scores["rsum"] == 0 and scores["i2t_meanr"] == 20


def test_one_image_is_always_found():
    one = np.array([[1.0, 0.0]], np.float32)
    assert retrieval_metrics(one, one, np.array([0]))["rsum"] == 600


def test_blocks_do_not_show(monkeypatch):
    rng = np.random.default_rng(1)
    image, text, owner = unit(rng, 23), unit(rng, 46), np.arange(46) // 2
    truth = rng.random((23, 46)) < 0.1
    truth[owner, np.arange(46)] = True
    whole = retrieval_metrics(image, text, owner) | metrics.complete_metrics(image, text, truth)
    monkeypatch.setattr(ranked_lists, "_BLOCK_ROWS", 5)
    monkeypatch.setattr(ranks, "_TILE_IMAGES", 5)
    monkeypatch.setattr(ranks, "_TILE_TEXTS", 7)
    parts = retrieval_metrics(image, text, owner) | metrics.complete_metrics(image, text, truth)
    assert whole == pytest.approx(parts, rel=1e-12)


def test_complete_metrics_are_their_definitions():
    rng = np.random.default_rng(2)
    image, text = unit(rng, 7), unit(rng, 15)
    truth = rng.random((7, 15)) < 0.25
    truth[np.arange(15) % 7, np.arange(15)] = True
    scores = metrics.complete_metrics(image, text, truth)
    similarity = image @ text.T
    for direction, s, relevant in (("i2t", similarity, truth), ("t2i", similarity.T, truth.T)):
        recall, precision, map_at_r = [], [], []
        for row, match in zip(s, relevant, strict=True):
            hits = match[np.argsort(-row)]
            r = match.sum()
            recall.append(hits[:5].any())
            precision.append(hits[:r].mean())
            map_at_r.append(sum(hits[: k + 1].mean() for k in range(r) if hits[k]) / r)
        for name, values in (("r5", recall), ("r_precision", precision), ("map_at_r", map_at_r)):
            assert scores[f"complete_{direction}_{name}"] == pytest.approx(100 * np.mean(values))


def test_collapsed_model_scores_nothing_against_the_complete_truth():
    same = np.ones((6, 1), np.float32)
    scores = metrics.complete_metrics(same, same, np.eye(6, dtype=bool))
    assert scores["complete_i2t_r5"] == 0 and scores["complete_t2i_map_at_r"] == 0


@pytest.mark.parametrize(
    ("image", "owner", "message"),
    [
        (np.eye(3, 4), np.array([0, 1, 1]), r"without a caption cannot be ranked: rows \[2\]"),
        (np.full((3, 4), np.nan), np.array([0, 1, 2]), "image_emb: not finite in 3 rows"),
        (np.eye(3, 4), np.array([0, 1, 3]), "expected rows 0 to 2, got 0 to 3"),
        (np.eye(3, 4), np.array([0, 1]), r"expected shape \(3,\), got \(2,\)"),
        (np.eye(3, 5), np.array([0, 1, 2]), r"\[images, dim\] and \[texts, dim\]"),
    ],
)
def test_bad_input_is_named(image, owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(image, np.eye(3, 4), owner)


def test_a_query_without_a_match_is_named():
    truth = np.eye(3, dtype=bool)
    truth[1] = False
    with pytest.raises(ValueError, match=r"without a match, rows \[1\]"):
        metrics.complete_metrics(np.eye(3), np.eye(3), truth)


def test_table_shows_both_truths():
    names = [f"{d}_{k}" for d in ("i2t", "t2i") for k in ("r1", "r5", "r10", "medr", "meanr")]
    complete = [
        f"complete_{d}_{k}"
        for d in ("i2t", "t2i")
        for k in ("r1", "r5", "r10", "r_precision", "map_at_r")
    ]
    scores = {name: float(n) for n, name in enumerate([*names, "rsum", *complete])}
    table = format_table(scores)
    assert "rSum 10.0" in table and "20.0" in table and "complete truth" in table
    assert "complete" not in format_table({k: v for k, v in scores.items() if "comp" not in k})

"""Metrics against plain definitions, ties, uneven captions and bad input."""

import numpy as np
import pytest

from fne_jax import retrieval_metrics
from fne_jax.evaluation import metrics, ranks
from fne_jax.evaluation import top_k as top_k_lib
from fne_jax.evaluation.top_k import first_hits, top_k


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


def test_the_example_at_the_head_of_the_module_is_right():
    similarity = np.array([[0.9, 0.2, 0.5, 0.1], [0.3, 0.7, 0.6, 0.4]])
    scores = retrieval_metrics(np.eye(2), similarity.T, np.array([0, 0, 1, 1]))
    assert (scores["i2t_r1"], scores["i2t_r5"], scores["i2t_meanr"]) == (50, 100, 1.5)
    assert (scores["t2i_r1"], scores["t2i_meanr"]) == (75, 1.25)


def test_ties_count_against_the_model():
    same = np.tile(np.array([[0.6, 0.8]], np.float32), (20, 1))
    scores = retrieval_metrics(same, same, np.arange(20))
    assert scores["rsum"] == 0 and scores["i2t_meanr"] == 20


def plain_ranks(similarity, owner):
    """The definition, loop by loop: how many others are at least as similar as the (best) own."""
    i2t = [
        sum(row[j] >= row[owner == i].max() for j in range(len(owner)) if owner[j] != i)
        for i, row in enumerate(similarity)
    ]
    t2i = [
        sum(similarity[i, j] >= similarity[own, j] for i in range(len(similarity)) if i != own)
        for j, own in enumerate(owner)
    ]
    return i2t, t2i


@pytest.mark.parametrize("tile", [(3, 4), (8, 64), (512, 5120)])
def test_ranks_are_their_definition_for_duplicates_too(monkeypatch, tile):
    monkeypatch.setattr(ranks, "_TILE_IMAGES", tile[0])
    monkeypatch.setattr(ranks, "_TILE_TEXTS", tile[1])
    rng = np.random.default_rng(3)
    # Small integers: every product is exact, and many are equal.
    image, text = rng.integers(-1, 2, (13, 3)), rng.integers(-1, 2, (41, 3))
    owner = rng.permutation(np.concatenate([np.arange(13), rng.integers(0, 13, 28)]))
    found = ranks.match_ranks(image, text, owner)
    i2t, t2i = plain_ranks(image @ text.T, owner)
    np.testing.assert_array_equal(found.i2t, i2t)
    np.testing.assert_array_equal(found.t2i, t2i)


def test_equal_embeddings_tie_in_every_tile():
    row = unit(np.random.default_rng(4), 1, dim=96)
    images, captions = 300, 2700
    owner = np.random.default_rng(5).permutation(np.arange(captions) % images)
    found = ranks.match_ranks(np.tile(row, (images, 1)), np.tile(row, (captions, 1)), owner)
    assert set(found.i2t) == {captions - captions // images} and set(found.t2i) == {images - 1}


def test_one_image_is_always_found():
    one = np.array([[1.0, 0.0]], np.float32)
    assert retrieval_metrics(one, one, np.array([0]))["rsum"] == 600


def test_blocks_do_not_show(monkeypatch):
    rng = np.random.default_rng(1)
    image, text, owner = unit(rng, 23), unit(rng, 46), np.arange(46) // 2
    truth = rng.random((23, 46)) < 0.1
    truth[owner, np.arange(46)] = True
    whole = retrieval_metrics(image, text, owner) | metrics.complete_metrics(image, text, truth)
    monkeypatch.setattr(top_k_lib, "BLOCK_ROWS", 5)
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


def test_the_first_items_are_sorted_and_the_lower_row_goes_first(monkeypatch):
    monkeypatch.setattr(top_k_lib, "BLOCK_ROWS", 4)
    rng = np.random.default_rng(6)
    # Small integers over 4: many equal similarities, positive, negative and zero of both signs.
    queries = rng.integers(-1, 2, (11, 3)).astype(np.float32) / 4
    gallery = rng.integers(-1, 2, (30, 3)).astype(np.float32)
    rows, similarities = top_k(queries, gallery, 9)
    expected = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(
        similarities, np.take_along_axis(queries @ gallery.T, expected, axis=1)
    )
    assert top_k(queries, gallery, 50)[0].shape == (11, 30)


@pytest.mark.parametrize("count", [3, 40])
def test_the_first_items_of_other_groups_against_a_plain_version(monkeypatch, count):
    monkeypatch.setattr(top_k_lib, "BLOCK_ROWS", 4)
    rng = np.random.default_rng(0)
    query, item = unit(rng, 9, 5), unit(rng, 17, 5)
    query_image, item_image = np.arange(9), rng.integers(0, 9, 17)
    rows, similarity = top_k(query, item, count, (query_image, item_image))
    assert rows.shape == similarity.shape == (9, min(count, 17))
    for q in range(9):
        others = np.flatnonzero(item_image != q)
        expected = others[np.argsort(-(item[others] @ query[q]))][:count]
        np.testing.assert_array_equal(rows[q, : len(expected)], expected)
        assert np.isfinite(similarity[q, : len(expected)]).all()
        assert (similarity[q, len(expected) :] == -np.inf).all()


def test_equally_similar_items_that_do_not_match_come_first():
    queries, gallery = np.ones((1, 1), np.float32), np.ones((6, 1), np.float32)
    gallery[5] = 0.5
    relevant = np.isin(np.arange(6), [0, 2, 5])[None]
    hits = first_hits(queries, gallery, relevant, 6)
    assert hits.tolist() == [[False, False, False, True, True, True]]
    hits = first_hits(queries, gallery, relevant, 3)
    assert hits.tolist() == [[False, False, False]]

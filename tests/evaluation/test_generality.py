"""The control for how much captions say, against plain definitions."""

import numpy as np
import pytest

from fne_jax.evaluation import generality
from fne_jax.evaluation.metric_names import describe
from fne_jax.evaluation.metrics import complete_metrics


def made_up(seed, images=9, texts=31):
    """Returns embeddings, a truth in which every image has matches, and numbers of words."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(images + texts, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    truth = rng.random((images, texts)) < 0.2
    truth[np.arange(texts) % images, np.arange(texts)] = True
    return vectors[:images], vectors[images:], truth, rng.integers(2, 12, texts)


def plainly_controlled(image, text, truth, words, weight):
    """R@1 and mAP@R by their definitions, from scores without ties."""
    values = []
    for row, match in zip(image.astype(np.float64) @ text.T, truth, strict=True):
        hits = match[np.argsort(-(row - weight * words))]
        count = match.sum()
        ap = sum(hits[: k + 1].mean() for k in range(count) if hits[k]) / count
        values.append((hits[0], ap))
    return dict(zip(generality.KEYS, 100 * np.mean(values, axis=0), strict=True))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.032, -0.256), (-0.1, 0.016)])
def test_controlled_metrics_are_their_definitions(weights):
    split = made_up(0)
    found = generality.controlled_metrics(*split, dict(zip(generality.KEYS, weights, strict=True)))
    assert found == pytest.approx(
        {
            "complete_i2t_r1_controlled": plainly_controlled(*split, weights[0])["r1"],
            "complete_i2t_map_at_r_controlled": plainly_controlled(*split, weights[1])["map_at_r"],
            "complete_i2t_r1_weight": weights[0],
            "complete_i2t_map_at_r_weight": weights[1],
        }
    )
    if not any(weights):
        plain = complete_metrics(*split[:3])
        for key in generality.KEYS:
            name = f"complete_i2t_{key}"
            assert found[f"{name}_controlled"] == pytest.approx(plain[name])


@pytest.mark.parametrize("seed", range(4))
def test_the_weights_are_those_of_the_highest_plain_metrics(seed):
    split = made_up(seed)
    plain = [plainly_controlled(*split, weight) for weight in generality.WEIGHTS]
    chosen = generality.choose_weights(*split)
    for key in generality.KEYS:
        best = max(metrics[key] for metrics in plain)
        among = [
            weight
            for weight, metrics in zip(generality.WEIGHTS, plain, strict=True)
            if metrics[key] > best - 1e-9
        ]
        assert chosen[key] in among and abs(chosen[key]) == min(map(abs, among))


@pytest.mark.parametrize("bias", [0.064, -0.064])
def test_what_a_system_gains_by_ranking_short_captions_is_taken_away(bias):
    """Two systems that differ by a preference for length alone are equal once controlled."""
    rng = np.random.default_rng(5)
    truth = rng.random((30, 90)) < 0.1
    truth[np.arange(90) % 30, np.arange(90)] = True
    words = rng.integers(2, 12, 90)
    similarity = 0.3 * truth + rng.normal(0, 0.1, truth.shape)

    def system(preference):
        # Products with the rows of the identity are the similarities themselves.
        return np.eye(30, dtype=np.float32), (similarity + preference * words).T.astype(np.float32)

    def map_at_r(preference):
        weights = generality.choose_weights(*system(preference), truth, words)
        controlled = generality.controlled_metrics(*system(preference), truth, words, weights)
        plain = complete_metrics(*system(preference), truth)["complete_i2t_map_at_r"]
        return plain, controlled["complete_i2t_map_at_r_controlled"], weights["map_at_r"]

    plain, controlled, weight = map_at_r(0.0)
    biased_plain, biased_controlled, biased_weight = map_at_r(bias)
    assert biased_plain < plain - 10 and biased_controlled == pytest.approx(controlled, abs=2)
    assert abs(weight) <= 0.008 and abs(biased_weight - bias) <= 0.5 * abs(bias)


def test_without_anything_to_choose_the_weights_are_zero():
    everything = np.ones((3, 5), bool)
    same = np.ones((3, 1), np.float32), np.ones((5, 1), np.float32)
    chosen = generality.choose_weights(*same, everything, np.arange(5))
    assert chosen == {"r1": 0, "map_at_r": 0}


def test_words_are_counted_between_blanks():
    counts = generality.word_counts(["a  red circle ", "a square", ""])
    assert counts.tolist() == [3, 2, 0]


def test_a_query_without_a_match_is_named():
    image, text, truth, words = made_up(0)
    truth[4] = False
    with pytest.raises(ValueError, match=r"without a match, rows \[4\]"):
        generality.choose_weights(image, text, truth, words)


def test_controlled_metrics_say_so():
    metric = describe("complete_i2t_r1_controlled")
    assert metric.heading == "controlled R@1 i2t"
    assert metric.legend == "image to text R@1, controlled"
    assert metric.definition.format(match="any true caption") == (
        "percentage of queries with any true caption among the first 1, captions ranked by "
        "similarity minus complete_i2t_r1_weight times their number of words"
    )
    weight = describe("complete_i2t_map_at_r_weight")
    assert weight.heading == "weight for mAP@R i2t" and weight.text(-0.0113) == "-0.011"

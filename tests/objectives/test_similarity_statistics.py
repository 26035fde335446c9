"""The similarity statistics and the posterior, against loops and Bayes' rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

import fne_jax
from fne_jax import SimilarityStatistics
from tests.support.fne import matching_rows, statistics

TRUSTED = statistics()

update = jax.jit(fne_jax.update_similarity_statistics)
posterior_of = jax.jit(fne_jax.false_negative_posterior, static_argnames="monotone")


def slow_statistics(batches, same_images):
    """Follows the method pair by pair over several batches."""
    acc = {"p": [0, 0.0, 0.0], "n": [0, 0.0, 0.0]}
    for (image, text), same in zip(batches, same_images, strict=True):
        s = np.asarray(image, np.float64) @ np.asarray(text, np.float64).T
        size = len(s)
        found = {"p": [], "n": []}
        for i in range(size):
            row = [j for j in range(size) if j == i or not same[i, j]]
            if max(row, key=lambda j: (s[i, j], -j)) != i:
                continue
            if max(row, key=lambda j: (s[j, i], -j)) != i:
                continue
            found["p"].append(s[i, i])
            found["n"].append(max(0.0 if same[i, j] else s[i, j] for j in range(size)))
            found["n"].append(max(0.0 if same[i, j] else s[j, i] for j in range(size)))
        for kind, values in found.items():
            acc[kind][0] += len(values)
            acc[kind][1] += sum(values)
            mean = acc[kind][1] / acc[kind][0] if acc[kind][0] else 0.0
            acc[kind][2] += sum((v - mean) ** 2 for v in values)
    return [
        (n, total / n if n else 0.0, dev / (n - 1) if n > 1 else 0.0)
        for n, total, dev in acc.values()
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_statistics_agree_with_the_slow_version(size):
    for seed in range(8):
        rng = np.random.default_rng([seed, size])
        stats, batches, same_images = SimilarityStatistics.create(), [], []
        for _ in range(3):
            image, text = matching_rows(rng, size, 6, noise=1.5)
            ids = rng.integers(0, max(size - 1, 1), size)
            same = ids[:, None] == ids[None, :]
            batches.append((image, text))
            same_images.append(same)
            stats = update(stats, image, text, same)
        for gaussian, (count, mean, variance) in zip(
            (stats.positive, stats.negative), slow_statistics(batches, same_images), strict=True
        ):
            assert gaussian.count == count
            np.testing.assert_allclose(gaussian.mean, mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(gaussian.variance, variance, rtol=1e-4, atol=1e-6)


def test_no_mutual_top_match_leaves_statistics_alone():
    image = np.eye(3, dtype=np.float32)
    stats = update(TRUSTED, image, np.roll(image, 1, axis=0))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), stats, TRUSTED))


def test_identical_embeddings_have_one_mutual_match():
    ones = np.ones((4, 4), np.float32) / 2
    stats = update(SimilarityStatistics.create(), ones, ones)
    assert stats.positive.count == 1 and stats.negative.count == 2
    assert stats.positive.variance == 0


def test_averaged_statistics_forget():
    image, text = matching_rows(np.random.default_rng(0), 7, 5, noise=0.1)
    stats = SimilarityStatistics.create()
    for _ in range(60):
        stats = update(stats, image, text, ema_decay=0.5)
    np.testing.assert_allclose(stats.positive.count, 14, rtol=1e-5)  # 7 / (1 - 0.5)
    np.testing.assert_allclose(stats.positive.mean, (image * text).sum(axis=1).mean(), rtol=1e-5)


def test_an_average_that_keeps_nothing_or_more_than_all_is_refused():
    rows = np.eye(2, dtype=np.float32)
    for ema_decay in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"ema_decay: expected a number in \(0, 1\], got"):
            fne_jax.update_similarity_statistics(TRUSTED, rows, rows, ema_decay=ema_decay)


def test_posterior_is_bayes_rule():
    similarity = np.linspace(-1, 1, 41)
    density = {
        name: scipy_stats.norm(g.mean, np.sqrt(g.variance)).pdf(similarity)
        for name, g in (("p", TRUSTED.positive), ("n", TRUSTED.negative))
    }
    expected = 0.01 * density["p"] / (0.01 * density["p"] + 0.99 * density["n"])
    ours = posterior_of(similarity, TRUSTED, 0.01)
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e-4, 0.5])
def test_posterior_is_a_probability_everywhere(variance):
    stats = statistics((0.9, variance), (0.1, 1e-6), counts=(300, 600))
    similarity = np.array([-1.0, -0.5, 0.0, 0.1, 0.5, 0.9, 1.0, 1e3, -1e3])
    posterior = posterior_of(similarity, stats)
    assert np.isfinite(posterior).all() and (posterior >= 0).all() and (posterior <= 1).all()


def test_posterior_is_the_prior_until_two_values_are_seen():
    one = statistics((0.9, 0.0), (0.1, 0.1), counts=(1, 2))
    ours = posterior_of(np.array([0.0, 0.9]), one, 0.03)
    np.testing.assert_array_equal(ours, np.float32(0.03))


@pytest.mark.parametrize("monotone", [False, True])
def test_posterior_has_no_gradient(monotone):
    gradient = jax.grad(lambda s: posterior_of(s, TRUSTED, 0.5, monotone=monotone).sum())
    np.testing.assert_array_equal(gradient(jnp.linspace(-1, 1, 9)), 0)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [((0.7, 0.01), (0.4, 0.03)), ((0.7, 0.03), (0.4, 0.01)), ((0.7, 0.02), (0.4, 0.02)),
     ((0.3, 0.02), (0.5, 0.02)), ((0.3, 0.01), (0.5, 0.03)), ((0.3, 0.03), (0.5, 0.01))],
)  # fmt: skip
def test_monotone_posterior_never_falls(positive, negative):
    stats = statistics(positive, negative, counts=(500, 500))
    similarity = np.linspace(-1, 1, 2001)
    posterior = np.asarray(posterior_of(similarity, stats, 0.1, monotone=True))
    assert (np.diff(posterior) >= -1e-6).all() and np.isfinite(posterior).all()
    if positive[1] != negative[1]:
        authors = np.asarray(posterior_of(similarity, stats, 0.1))
        assert (np.diff(authors) < 0).any(), "the case should need the monotone form"
        rising = np.diff(authors) > 1e-6
        if positive[0] > negative[0]:
            np.testing.assert_allclose(posterior[1:][rising], authors[1:][rising], atol=1e-5)

"""FNE's weights and the sampling by them, against loops and on edge cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

import fne_jax
from fne_jax.objectives.negative_sampling import _sample_from_uniform
from tests.support.fne import slow_posterior, slow_sample, slow_weights, statistics

TRUSTED = statistics()

weigh = jax.jit(fne_jax.sampling_weights)
sample = jax.jit(fne_jax.sample_negatives)
sample_from_uniform = jax.jit(_sample_from_uniform)


@pytest.mark.parametrize(("min_count", "listed"), [(200, False), (700, False), (700, True)])
def test_weights_agree_with_the_slow_version(min_count, listed):
    rng = np.random.default_rng(3)
    s = rng.uniform(-0.2, 1, (4, 23)).astype(np.float32)
    d = rng.uniform(0.5, 0.9, 4).astype(np.float32)
    same = rng.random((4, 23)) < 0.2
    settings = {"margin": 0.3, "tau": 0.7, "prior": 0.02, "min_count": min_count}
    settings["posterior"] = rng.random((4, 23)).astype(np.float32) if listed else None
    ours = weigh(s, d[:, None], same, TRUSTED, posterior_threshold=0.1, **settings)
    slow = slow_weights(s, d, same, TRUSTED, threshold=0.1, **settings)
    np.testing.assert_allclose(ours, slow, rtol=1e-5)
    assert (slow == 0).any() and (slow > 0).any()


def test_parts_of_the_weights_can_be_switched_off():
    s = np.array([[0.55, 0.72, 0.95]], np.float32)
    args = s, np.array([[0.8]], np.float32), np.zeros((1, 3), bool), TRUSTED
    posterior = slow_posterior(s, TRUSTED, 0.5)
    cutdown = np.exp(-0.5 * (s - 0.8) ** 2)
    off = weigh(*args, prior=0.5, posterior_threshold=1.0)
    np.testing.assert_allclose(off, cutdown, rtol=1e-6)
    shared = {"prior": 0.5, "posterior_threshold": 0.8}
    uniform = weigh(*args, tau=0.0, elimination_tau=0.5, **shared)
    expected = np.where(posterior > 0.8, np.exp(-0.5 * posterior), 1.0)
    np.testing.assert_allclose(uniform, expected, rtol=1e-5)
    hard = weigh(*args, elimination_tau=1e30, **shared)
    np.testing.assert_array_equal(np.asarray(hard) == 0, posterior > 0.8)
    assert 0 < (posterior > 0.8).sum() < 3


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("margin", -0.1, r"margin: expected a number in \[0, inf\], got -0.1"),
        ("tau", -1.0, "tau: expected a number"),
        ("elimination_tau", -1.0, "elimination_tau: expected a number"),
        ("prior", 0.0, r"prior: expected a number in \(0, 1\), got 0.0"),
        ("prior", 1.0, "prior: expected a number"),
        ("posterior_threshold", 2.0, "posterior_threshold: expected a number"),
        ("min_count", -1, "min_count: expected a number"),
    ],
)
def test_settings_out_of_range_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        fne_jax.sampling_weights(
            np.ones((2, 3), "f"), np.ones((2, 1), "f"), np.zeros((2, 3), bool), TRUSTED,
            **{setting: value},
        )  # fmt: skip


def test_arrays_that_would_broadcast_by_accident_are_refused():
    with pytest.raises(
        ValueError, match=r"as many axes as each other, got shapes \(3, 3\), \(3,\)"
    ):
        fne_jax.sampling_weights(
            np.ones((3, 3), "f"), np.ones(3, "f"), np.zeros((3, 3), bool), TRUSTED
        )


def test_masks_of_integers_and_ids_of_64_bits_are_refused():
    s, mask, rng = np.ones((3, 3), "f"), np.eye(3, dtype=int), jax.random.key(0)
    rules = fne_jax.hardest_negative, fne_jax.semi_hard_negative, fne_jax.random_negative
    for call in (
        lambda: fne_jax.sampling_weights(s, s, mask, TRUSTED),
        lambda: fne_jax.update_similarity_statistics(TRUSTED, s, s, mask),
        *(functools.partial(rule, rng, s, s[0], mask) for rule in rules),
    ):
        with pytest.raises(ValueError, match="expected a bool dtype, got int"):
            call()
    with pytest.raises(ValueError, match="image_id: expected integers that int32 can hold, got 42"):
        fne_jax.Features(s, s, image_id=np.array([0, 5, 2**32 + 5]))


@pytest.mark.parametrize("keys", [1, 5, 127, 128, 129, 300, 1000])
def test_samples_agree_with_the_slow_version(keys):
    rng = np.random.default_rng(keys)
    # Multiples of 1/64 add up exactly, so that both versions see the same borders.
    weights = (rng.integers(0, 65, (64, keys)) / 64 * (rng.random((64, keys)) < 0.3)).astype("f")
    weights[::9] = 0
    uniform = rng.random(64).astype(np.float32)
    fallback = rng.integers(0, keys, 64)
    ours = sample_from_uniform(uniform, weights, fallback)
    np.testing.assert_array_equal(ours, slow_sample(uniform, weights, fallback))


def test_samples_are_proportional_to_the_weights():
    rng = np.random.default_rng(0)
    weights = rng.random(301).astype(np.float32) * (rng.random(301) < 0.5)
    rows = np.broadcast_to(weights, (1000, 301))
    draws = 100_000
    keys = jax.random.split(jax.random.key(1), draws // 1000)
    sampled = jax.jit(
        lambda keys: jax.lax.map(
            lambda key: fne_jax.sample_negatives(key, rows, jnp.zeros(1000, jnp.int32)), keys
        )
    )(keys)
    counts = np.bincount(np.asarray(sampled).ravel(), minlength=301)
    assert (counts[weights == 0] == 0).all()
    expected = draws * weights.astype(np.float64) / weights.sum(dtype=np.float64)
    assert scipy_stats.chisquare(counts[weights > 0], expected[weights > 0]).pvalue > 1e-3


def test_never_samples_a_zero_weight_among_many_keys():
    keys = 131_072
    rng = np.random.default_rng(5)
    weights = np.zeros((32, keys), np.float32)
    for row in weights:
        row[rng.choice(keys, 40, replace=False)] = rng.random(40) + 1e-3
    edge = np.float32(1) - np.float32(2) ** -24
    for uniform in (np.zeros(32, np.float32), np.full(32, edge), rng.random(32).astype("f")):
        sampled = np.asarray(sample_from_uniform(uniform, weights, np.zeros(32, np.int32)))
        assert (weights[np.arange(32), sampled] > 0).all()


def test_sampling_is_reproducible_and_uses_the_fallback():
    weights = np.ones((3, 700), np.float32)
    weights[1] = 0
    fallback = np.array([1, 2, 3])
    first, again = (sample(jax.random.key(4), weights, fallback) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first[1] == 2
    other = sample(jax.random.key(5), weights, fallback)
    assert (np.asarray(other) != np.asarray(first)).any()


def test_eight_devices_sample_what_one_samples():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    weights = np.random.default_rng(2).random((16, 1000)).astype("f")
    fallback = np.zeros(16, np.int32)
    np.testing.assert_array_equal(
        sample(jax.random.key(1), weights, fallback),
        sample(jax.random.key(1), jax.device_put(weights, rows), fallback),
    )

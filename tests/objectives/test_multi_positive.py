"""The losses with several positives beside plain loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fne_jax
from fne_jax import Features, Matches
from tests.support.fne import assert_gradient, matching_rows

BATCH, DIM = 7, 5


def pairs():
    return matching_rows(np.random.default_rng(1), BATCH, DIM, noise=1.0)


def masks():
    """Returns positives, of which one anchor has all and others several, and what is excluded."""
    rng = np.random.default_rng(2)
    positives = (rng.random((BATCH, BATCH)) < 0.25) | np.eye(BATCH, dtype=bool)
    positives[4] = True
    excluded = rng.random((BATCH, BATCH)) < 0.3
    assert (excluded & positives).any() and (excluded & ~positives).any()
    return positives, excluded


def weights():
    """Returns what positives count, one of an anchor nothing; own ones are to count 1 anyway."""
    weight = np.random.default_rng(3).random((BATCH, BATCH)).astype(np.float32)
    weight[4, 2] = 0
    return weight


def features_of(image, text, positives, excluded, weight=None):
    matches = None if positives is None else Matches(positives, weight=weight)
    return Features(image, text, same_image=excluded, matches=matches)


def multi_positive(image, text, temperature, positives, excluded, weight=None):
    return fne_jax.multi_positive_loss(
        features_of(image, text, positives, excluded, weight),
        temperature=temperature,
        matches_are_positives=True,
    )[0]


def slow_multi_positive(image, text, temperature, positives, excluded, weight=None):
    s = np.asarray(image, np.float64) @ np.asarray(text, np.float64).T
    weight = np.ones(s.shape) if weight is None else np.where(np.eye(len(s)), 1, weight)
    total = 0.0
    for scores, p, e, w in (
        (s, positives, excluded, weight),
        (s.T, positives.T, excluded.T, weight.T),
    ):
        for i in range(len(s)):
            of_positives = []
            for j in np.flatnonzero(p[i]):
                negatives = [n for n in range(len(s)) if not p[i, n] and not e[i, n]]
                gaps = [(scores[i, n] - scores[i, j]) / temperature for n in negatives]
                of_positives.append(np.log1p(np.exp(gaps).sum()))
            total += np.average(of_positives, weights=w[i, p[i]])
    return total / (2 * len(s))


@pytest.mark.parametrize("weight", [None, weights()])
def test_multi_positive_loss_is_the_mean_over_positives_of_what_negatives_exceed(weight):
    positives, excluded = masks()
    differentiate = jax.jit(
        jax.value_and_grad(
            lambda image, text, temperature: multi_positive(
                image, text, temperature, positives, excluded, weight
            ),
            (0, 1, 2),
        )
    )
    arguments = *pairs(), np.float32(0.3)
    loss, grads = differentiate(*arguments)
    expected = slow_multi_positive(*pairs(), 0.3, positives, excluded, weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert all((np.asarray(grad) != 0).any() for grad in grads)
    assert_gradient(differentiate, arguments)


def test_with_one_positive_each_it_is_clip_loss():
    image, text = pairs()
    _, excluded = masks()

    def ours(image, text, mask, temperature):
        return multi_positive(image, text, temperature, None, mask)

    def clips(image, text, mask, temperature):
        features = Features(image, text, same_image=mask)
        return fne_jax.clip_loss(features, temperature=temperature)[0]

    ours, clips = (jax.jit(jax.value_and_grad(loss, (0, 1))) for loss in (ours, clips))
    for temperature in (0.02, 0.3):
        for mask in (np.eye(BATCH, dtype=bool), excluded):
            loss, grads = ours(image, text, mask, temperature)
            expected, expected_grads = clips(image, text, mask, temperature)
            np.testing.assert_allclose(loss, expected, rtol=1e-5)
            for a, b in zip(grads, expected_grads, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("temperature", [1e-4, 100.0])
def test_it_is_finite_at_any_temperature_and_without_negatives(temperature):
    image, text = pairs()
    positives, excluded = masks()
    everything = np.ones((BATCH, BATCH), bool)
    own = np.eye(BATCH, dtype=bool)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def differentiate(image, text, positives, excluded):
        return multi_positive(image, text, temperature, positives, excluded)

    for p, e in ((positives, excluded), (everything, own), (own, everything)):
        loss, grads = differentiate(image, text, p, e)
        assert np.isfinite(loss) and all(np.isfinite(grad).all() for grad in grads)
        assert (loss == 0) == (p is not positives)


def test_positives_do_not_compete():
    # Two captions of one image: with the second nearer, the first's loss is none the higher.
    image = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    text = jnp.array([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    same = np.array([0, 0, 1])
    positives = same[:, None] == same[None, :]
    loss = multi_positive(image, text, 0.1, positives, None)
    expected = slow_multi_positive(image, text, 0.1, positives, np.eye(3, dtype=bool))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    by_label, _ = fne_jax.multi_positive_loss(Features(image, text, image_id=same), temperature=0.1)
    assert by_label == loss < fne_jax.clip_loss(Features(image, text), temperature=0.1)[0]


@pytest.mark.parametrize("weight", [None, weights()])
def test_sigmoid_loss_takes_several_positives(weight):
    image, text = pairs()
    positives, excluded = masks()
    logits = np.asarray(image @ text.T, np.float64) / 0.4 - 2.0
    total = 0.0
    for i, j in np.ndindex(BATCH, BATCH):
        if positives[i, j]:
            counts = 1 if weight is None or i == j else weight[i, j]
            total += counts * np.log1p(np.exp(-logits[i, j]))
        elif not excluded[i, j]:
            total += np.log1p(np.exp(logits[i, j]))

    def loss_fn(image, text, temperature, bias):
        features = features_of(image, text, positives, excluded, weight)
        return fne_jax.sigmoid_loss(
            features, temperature=temperature, bias=bias, matches_are_positives=True
        )[0]

    differentiate = jax.jit(jax.value_and_grad(loss_fn, (0, 1, 2, 3)))
    arguments = image, text, np.float32(0.4), np.float32(-2.0)
    np.testing.assert_allclose(differentiate(*arguments)[0], total / BATCH, rtol=1e-5)
    assert_gradient(differentiate, arguments)


def test_wrong_arguments_are_named():
    image, text = pairs()
    mask = np.ones((7, 6), bool)
    own = np.eye(7, dtype=bool)
    wrong = Matches(mask), Matches(own, weight=mask)
    for change in ({"same_image": mask}, *({"matches": one} for one in wrong)):
        with pytest.raises(ValueError, match=r"expected shape \(7, 7\), got \(7, 6\)"):
            fne_jax.multi_positive_loss(Features(image, text, **change))
    with pytest.raises(ValueError, match="temperature: expected a number in"):
        fne_jax.multi_positive_loss(Features(image, text), temperature=0.0)

"""The other rules for the negative, beside plain loops."""

import functools

import jax
import numpy as np
import pytest
from scipy import stats as scipy_stats

import fne_jax
from fne_jax import Features
from tests.support.fne import (
    assert_gradient,
    keys_of,
    make_batch,
    matching_rows,
    slow_posterior,
    statistics,
)

TRUSTED = statistics()


@functools.partial(jax.jit, static_argnames="rule")
def differentiate(rng, features, queue, rule):
    """Returns (loss, aux) and the gradient for the online embeddings."""

    def loss_fn(image, text):
        moved = features.replace(image=image, text=text)
        return fne_jax.mined_triplet_loss(moved, queue, TRUSTED, rng, rule=rule, margin=0.4)

    return jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(features.image, features.text)


def slow_rule(rule, similarity, positive, candidates):
    """Returns the choice of one anchor among candidate indices, None where any would do."""
    if rule is fne_jax.random_negative:
        return None
    if rule is fne_jax.hardest_negative:
        return max(candidates, key=lambda j: (similarity[j], -j))
    semi_hard = [j for j in candidates if similarity[j] < positive]
    if semi_hard:
        return max(semi_hard, key=lambda j: (similarity[j], -j))
    return min(candidates, key=lambda j: (similarity[j], j))


@pytest.mark.parametrize("rule", ["hardest_negative", "semi_hard_negative", "random_negative"])
@pytest.mark.parametrize("with_queue", [True, False])
def test_mined_negatives_agree_with_the_plain_loops(rule, with_queue):
    rule = getattr(fne_jax, rule)
    for seed in range(3):
        features, queue = make_batch(seed)
        assert (queue.image_id == -1).any(), "the case should have empty slots"
        queue = queue if with_queue else None
        rng = jax.random.key(seed)
        (loss, aux), grads = differentiate(rng, features, queue, rule)
        expected, posteriors = 0.0, []
        indices = aux.negative_i2t, aux.negative_t2i
        for (anchor, keys, key_id), index in zip(keys_of(features, queue), indices, strict=True):
            similarity = anchor @ keys.T
            index = np.asarray(index)
            for i in range(6):
                candidates = [
                    j
                    for j in range(len(keys))
                    if key_id[j] != features.image_id[i] and key_id[j] != -1
                ]
                assert index[i] in candidates
                choice = slow_rule(rule, similarity[i], similarity[i, i], candidates)
                assert choice is None or index[i] == choice
                expected += max(0.4 + similarity[i, index[i]] - similarity[i, i], 0)
                posteriors.append(slow_posterior(similarity[i, index[i]], TRUSTED, 1e-4))
        np.testing.assert_allclose(loss, expected / 6, rtol=1e-5)
        np.testing.assert_allclose(aux.posterior, np.mean(posteriors), rtol=1e-3)
        assert all((np.asarray(grad) != 0).any() for grad in grads)

        def loss_and_gradient(image, text, rng=rng, features=features, queue=queue):
            moved = features.replace(image=image, text=text)
            (loss, _), grads = differentiate(rng, moved, queue, rule)
            return loss, grads

        assert_gradient(loss_and_gradient, (features.image, features.text))


def test_random_negatives_are_uniform_over_other_images():
    features, queue = make_batch(0)

    def negatives(rng):
        _, aux = fne_jax.mined_triplet_loss(
            features, queue, TRUSTED, rng, rule=fne_jax.random_negative
        )
        return aux.negative_i2t

    keys = jax.random.split(jax.random.key(0), 3000)
    sampled = np.asarray(jax.jit(jax.vmap(negatives))(keys))
    key_id = np.concatenate([features.image_id, queue.image_id])
    candidates = np.flatnonzero((key_id != features.image_id[0]) & (key_id != -1))
    counts = np.bincount(sampled[:, 0], minlength=17)
    assert counts[candidates].sum() == 3000
    assert scipy_stats.chisquare(counts[candidates]).pvalue > 1e-3


@pytest.mark.parametrize("rule", ["hardest_negative", "semi_hard_negative", "random_negative"])
def test_a_lone_pair_has_no_mined_negative(rule):
    image, text = matching_rows(np.random.default_rng(0), 1, 5)
    lone = Features(image, text, image, text, np.array([3]))
    (loss, aux), _ = differentiate(jax.random.key(0), lone, None, getattr(fne_jax, rule))
    assert loss == 0 and aux.fallback_fraction == 1
    assert not aux.counts_i2t.any() and not aux.counts_t2i.any() and np.isnan(aux.posterior)
    assert aux.hardest_i2t == aux.hardest_t2i == -1

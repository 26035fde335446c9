"""Objectives that leave known matches out, beside plain versions on the candidates that are left.

Image ids repeat, slots are empty, and the matches of images are not those of captions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fne_jax
from configs import base
from fne_jax.objectives import registry
from fne_jax.objectives.fne_loss import _loss_from_uniforms
from fne_jax.objectives.similarity_statistics import SimilarityStatistics, StatisticsRule
from tests.support.fne import (
    excluded_of,
    keys_of,
    known_of,
    make_batch,
    make_matches,
    slow_loss,
    statistics,
)

QUEUES = pytest.mark.parametrize("with_queue", [True, False])


def batch_with_matches(seed, with_queue=True, listed=False, **sizes):
    features, queue = make_batch(seed, images=6, **sizes)
    sizes.pop("filled", None)
    sizes.pop("dim", None)
    same = features.image_id[:, None] == features.image_id[None, :]
    matches = make_matches(seed, **sizes)
    if listed:  # in 255ths of a probability
        rng = np.random.default_rng(seed)
        matches = jax.tree.map(
            lambda mask: mask * rng.integers(0, 256, mask.shape, np.uint8), matches
        )
    features = features.replace(same_image=same, matches=matches)
    return features, queue if with_queue else None


def left_of(features, queue):
    """Yields the anchors, the keys and [batch, keys] bool, which are candidates: both directions.

    Unlike for `fne`, empty slots are none.
    """
    directions = keys_of(features, queue), excluded_of(features, queue)
    for (anchor, keys, key_id), excluded in zip(*directions, strict=True):
        yield anchor, keys, ~excluded & (key_id != -1)


def objective_of(name, **fields):
    config = base.get_config()
    fields = {"objective.name": name, "objective.oracle": "drop", **fields}
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return registry.main_objective(config)


@QUEUES
@pytest.mark.parametrize("positive_mean", [0.3, 1.3])  # at 1.3 nothing can be sampled
def test_fne_samples_among_what_is_left(with_queue, positive_mean):
    stats = statistics((positive_mean, 0.01), (0.2, 0.02), counts=(500, 999))
    loss_fn = jax.jit(functools.partial(_loss_from_uniforms, margin=0.4))
    changed = 0
    for seed in range(4):
        features, queue = batch_with_matches(seed, with_queue)
        uniforms = np.random.default_rng(seed).random((2, 6)).astype(np.float32)
        loss, aux = loss_fn(uniforms, features, queue, stats)
        expected, chosen = slow_loss(uniforms, features, queue, stats, 0.4)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_array_equal(aux.negative_i2t, chosen[0])
        np.testing.assert_array_equal(aux.negative_t2i, chosen[1])
        (anchor, keys, _), excluded = keys_of(features, queue)[0], excluded_of(features, queue)[0]
        labelled = excluded_of(features.replace(matches=None), queue)[0]
        hardest = np.where(labelled, -np.inf, anchor @ keys.T).argmax(axis=1)
        changed += np.take_along_axis(excluded, hardest[:, None], axis=1).sum()
    assert changed, "no case has a match as the hardest key of another image"


@pytest.mark.parametrize("listed", [False, True])
def test_fne_in_chunks_leaves_the_same_out(listed):
    sizes = {"batch": 19, "queue_size": 16 * 7 + 5}
    features, queue = batch_with_matches(3, listed=listed, filled=16 * 7, dim=7, **sizes)
    uniforms = np.random.default_rng(0).random((2, 19)).astype(np.float32)
    stats = statistics((0.4, 0.02), (0.2, 0.02), counts=(500, 999))
    expected, chosen = slow_loss(uniforms, features, queue, stats, 0.2)
    loss_fn = jax.jit(_loss_from_uniforms, static_argnames="key_chunk")
    for chunk in (48, None):
        loss, aux = loss_fn(uniforms, features, queue, stats, key_chunk=chunk)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_array_equal(aux.negative_t2i, chosen[1])
        assert max(aux.negative_i2t) > 19, "the case should reach into the queue"


@QUEUES
@pytest.mark.parametrize("hard", [False, True])
def test_fne_suspects_by_a_list_before_it_has_seen_any_pair(with_queue, hard):
    stats = statistics((0.3, 0.01), (0.2, 0.02), counts=(100, 999))
    settings = {"elimination_tau": 1e30} if hard else {}
    of_chosen = []
    loss_fn = jax.jit(functools.partial(_loss_from_uniforms, margin=0.4, **settings))
    for seed in range(4):
        features, queue = batch_with_matches(seed, with_queue, listed=True)
        uniforms = np.random.default_rng(seed).random((2, 6)).astype(np.float32)
        loss, aux = loss_fn(uniforms, features, queue, stats)
        eliminated = 1e-3 if hard else 1.0
        expected, chosen = slow_loss(uniforms, features, queue, stats, 0.4, eliminated)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        found = []
        for ours, counts, theirs, known in zip(
            (aux.negative_i2t, aux.negative_t2i),
            (aux.counts_i2t, aux.counts_t2i),
            chosen,
            known_of(features, queue),
            strict=True,
        ):
            np.testing.assert_array_equal(ours[counts], theirs[counts])
            found += (known[np.arange(6), theirs] / 255)[counts].tolist()
        np.testing.assert_allclose(aux.posterior, np.mean(found), rtol=1e-5)
        of_chosen += found
    assert (max(of_chosen) == 0) == hard


@QUEUES
def test_rules_choose_among_what_is_left(with_queue):
    stats = SimilarityStatistics.create()
    for rule, among in (
        (fne_jax.hardest_negative, lambda s, d: np.ones_like(s, bool)),
        (fne_jax.semi_hard_negative, lambda s, d: s < d[:, None]),
    ):
        loss_fn = jax.jit(functools.partial(fne_jax.mined_triplet_loss, rule=rule, margin=0.4))
        for seed in range(4):
            features, queue = batch_with_matches(seed, with_queue)
            loss, aux = loss_fn(features, queue, stats, jax.random.key(0))
            total, chosen = 0.0, (aux.negative_i2t, aux.negative_t2i)
            for (anchor, keys, left), index in zip(left_of(features, queue), chosen, strict=True):
                s = anchor @ keys.T
                d = (anchor * keys[:6]).sum(axis=1)
                for i in np.flatnonzero(left.any(axis=1)):
                    wanted = left[i] & among(s, d)[i]
                    # Where none is semi-hard, the least similar.
                    best = np.argmax(np.where(wanted, s[i], -np.inf))
                    if not wanted.any():
                        best = np.argmin(np.where(left[i], s[i], np.inf))
                    assert index[i] == best
                    total += max(0.4 + s[i, best] - d[i], 0)
            np.testing.assert_allclose(loss, total / 6, rtol=1e-5)


def test_random_negatives_reach_all_that_is_left_and_nothing_else():
    features, queue = batch_with_matches(5)
    stats = SimilarityStatistics.create()
    draw = jax.jit(jax.vmap(lambda rng: objective_of("random")(features, queue, stats, rng)[1]))
    aux = draw(jax.random.split(jax.random.key(0), 300))
    for index, (_, _, left) in zip(
        (aux.negative_i2t, aux.negative_t2i), left_of(features, queue), strict=True
    ):
        for i in np.flatnonzero(left.any(axis=1)):
            assert set(np.asarray(index[:, i])) == set(np.flatnonzero(left[i]))


@QUEUES
def test_infonce_is_cross_entropy_over_what_is_left(with_queue):
    features, queue = batch_with_matches(4, with_queue)
    total = 0.0
    for anchor, keys, left in left_of(features, queue):
        for i in range(6):
            logits = (anchor[i] @ keys.T).astype(np.float64) / 0.3
            total += np.log(np.exp(logits[left[i]]).sum() + np.exp(logits[i])) - logits[i]
    objective = objective_of("infonce", **{"objective.temperature": 0.3})

    @jax.jit
    def differentiate(image):
        return jax.value_and_grad(
            lambda image: objective(features.replace(image=image), queue, None, None)[0]
        )(image)

    loss, grads = differentiate(features.image)
    np.testing.assert_allclose(loss, total / 12, rtol=1e-5)
    assert np.isfinite(grads).all()


def in_batch_negatives(features):
    """Returns the similarities and which images and captions are negatives, [batch, batch]."""
    s = np.asarray(features.image @ features.text.T, np.float64)
    return s, ~(features.same_image | features.matches.batch)


def test_clip_is_cross_entropy_over_what_is_left():
    features, _ = batch_with_matches(6)
    s, left = in_batch_negatives(features)
    total = 0.0
    for scores, negative in ((s, left), (s.T, left.T)):
        for i in range(6):
            rest = np.exp((scores[i, negative[i]] - scores[i, i]) / 0.3)
            total += np.log1p(rest.sum())
    objective = objective_of("clip", **{"objective.temperature": 0.3})
    loss, _ = objective(features, None, None, None)
    np.testing.assert_allclose(loss, total / 12, rtol=1e-5)


def test_hardest_within_the_batch_leaves_matches_out():
    features, _ = batch_with_matches(6)
    s, left = in_batch_negatives(features)
    total = 0.0
    for scores, negative in ((s, left), (s.T, left.T)):
        for i in range(6):
            gaps = [0.2 + scores[i, j] - scores[i, i] for j in np.flatnonzero(negative[i])]
            total += max([0.0, *gaps])
    loss, _ = objective_of("hardest", **{"objective.queue": False})(features, None, None, None)
    np.testing.assert_allclose(loss, total / 6, rtol=1e-5)


@pytest.mark.parametrize("oracle", ["drop", "positives"])
def test_losses_of_several_positives_drop_matches_or_take_them(oracle):
    features, _ = batch_with_matches(6)
    s, left = in_batch_negatives(features)
    fields = {"objective.oracle": oracle, "objective.temperature": 0.3, "objective.bias": -1.0}
    # Captions of an image are its labelled matches, and positives of multi_positive in any case.
    same = features.image_id[:, None] == features.image_id[None, :]
    positives = same | features.matches.batch if oracle == "positives" else same
    total = 0.0
    for scores, positive, negative in ((s, positives, left), (s.T, positives.T, left.T)):
        for i in range(6):
            of = [
                np.log1p(np.exp((scores[i, negative[i]] - scores[i, j]) / 0.3).sum())
                for j in np.flatnonzero(positive[i])
            ]
            total += np.mean(of)
    loss, _ = objective_of("multi_positive", **fields)(features, None, None, None)
    np.testing.assert_allclose(loss, total / 12, rtol=1e-5)

    if oracle == "drop":
        positives = np.eye(6, dtype=bool)
    logits = s / 0.3 - 1.0
    total = np.log1p(np.exp(-logits[positives])).sum() + np.log1p(np.exp(logits[left])).sum()
    loss, _ = objective_of("sigmoid", **fields)(features, None, None, None)
    np.testing.assert_allclose(loss, total / 6, rtol=1e-5)


def test_matches_are_neither_competitors_nor_negatives_of_the_statistics():
    rule = StatisticsRule(ema_decay=1.0, steps_per_epoch=None)
    counts = set()
    for seed in range(4):
        features, _ = batch_with_matches(seed, batch=9, dim=3)
        features = dataclasses.replace(features, text=features.momentum_text)  # not all on top
        s, left = in_batch_negatives(features)
        stats = rule.add(SimilarityStatistics.create(), features)
        positive, negative = [], []
        for i in range(9):
            rivals = [*s[i, left[i]], *s[left[:, i], i]]
            if s[i, i] >= max(rivals, default=-1):
                positive.append(s[i, i])
                # Where nothing is left, or only what is below it: 0.
                negative += [max([0, *s[i, left[i]]]), max([0, *s[left[:, i], i]])]
        counts.add(len(positive))
        assert stats.positive.count == len(positive)
        np.testing.assert_allclose(stats.positive.total, sum(positive), rtol=1e-5)
        np.testing.assert_allclose(stats.negative.total, sum(negative), rtol=1e-5, atol=1e-6)
    assert counts - {0, 9}, "in no case are some pairs on top and others not"


def test_matches_that_do_not_fit_are_named():
    features, queue = batch_with_matches(0)
    with pytest.raises(ValueError, match=r"matches.batch: expected shape \(6, 6\), got \(5, 6\)"):
        other = fne_jax.Matches(jnp.ones((5, 6), bool))
        fne_jax.infonce_loss(features.replace(matches=other), queue)
    with pytest.raises(ValueError, match=r"matches.queue_text: expected"):
        batch_alone = fne_jax.Matches(features.matches.batch)
        fne_jax.infonce_loss(features.replace(matches=batch_alone), queue)

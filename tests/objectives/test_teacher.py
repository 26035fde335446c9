"""What a teacher says of a step beside plain loops in float64, on sizes that differ."""

import functools

import jax
import numpy as np
import pytest

from configs import base
from fne_jax import Features
from fne_jax.objectives import registry
from fne_jax.objectives.teacher import Teacher, soft_target_loss
from tests.support.fne import assert_gradient, make_matches, matching_rows, unit_rows

IMAGES, PAIRS, BATCH = 5, 13, 6
CAPTION_IMAGE = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2], np.int32)


def teacher_of(margin=None):
    rng = np.random.default_rng(0)
    emb = unit_rows(rng, IMAGES, 3), unit_rows(rng, PAIRS, 3)
    return Teacher(*(rows.astype(np.float16) for rows in emb), CAPTION_IMAGE, margin)


def slow_divergence(teacher, similarity, temperature, teacher_temperature):
    total = 0.0
    for of_teacher, of_model in zip(teacher, similarity, strict=True):
        target = np.exp(of_teacher / teacher_temperature)
        found = np.exp(of_model / temperature)
        target, found = target / target.sum(), found / found.sum()
        total += (target * np.log(target / found)).sum()
    return total / len(teacher)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.1, "teacher_temperature": 0.3}])
def test_soft_targets_are_the_teachers_similarities_within_a_modality(settings):
    image, text = matching_rows(np.random.default_rng(1), BATCH, 4)
    of_teacher = teacher_of().of_pairs(np.array([7, 0, 12, 3, 9, 1]))
    weights = {"cross_weight": 0.2, "own_weight": 0.7}

    def loss_fn(image, text):
        features = Features(image, text, teacher=of_teacher)
        return soft_target_loss(features, **weights, **settings)

    differentiate = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))
    i, t, teacher_i, teacher_t = (np.float64(rows) for rows in (image, text, *of_teacher))
    divergence = functools.partial(
        slow_divergence,
        temperature=settings.get("temperature", 0.45),
        teacher_temperature=settings.get("teacher_temperature", 1.0),
    )
    targets = teacher_i @ teacher_i.T, teacher_t @ teacher_t.T
    across = divergence(targets[0], i @ t.T) + divergence(targets[1], t @ i.T)
    own = divergence(targets[0], i @ i.T) + divergence(targets[1], t @ t.T)
    expected = 0.2 * across / 2 + 0.7 * own / 2
    np.testing.assert_allclose(differentiate(image, text)[0], expected, rtol=1e-4)
    assert_gradient(differentiate, (image, text))


def test_they_are_added_to_any_objective():
    image, text = matching_rows(np.random.default_rng(1), BATCH, 4)
    features = Features(image, text, teacher=teacher_of().of_pairs(np.arange(BATCH)))
    config = base.get_config()
    objective = {"name": "clip", "temperature": 0.1, "teacher_own_weight": 0.3}
    config.objective.update(objective | {"teacher_temperature": 0.2})

    def loss(teacher):
        config.objective.teacher = teacher
        return registry.main_objective(config)(features, None, None, None)[0]

    added = soft_target_loss(features, own_weight=0.3, temperature=0.2)
    np.testing.assert_allclose(loss("there"), loss("") + added, rtol=1e-6)


@pytest.mark.parametrize("margin", [-0.3, 0.1])
@pytest.mark.parametrize("listed", [False, True])
def test_what_it_finds_nearer_than_the_positive_is_left_out(margin, listed):
    teacher = teacher_of(margin)
    pair, slots = np.array([7, 0, 12, 3, 9, 1]), np.array([-1, 2, 11, 5, -1, 8, 6])
    known = make_matches(2, queue_size=len(slots)) if listed else None
    found = jax.jit(Teacher.left_out)(teacher, known, pair, slots)
    image, text = np.float64(teacher.image), np.float64(teacher.text)
    expected = [np.zeros((BATCH, keys), bool) for keys in (BATCH, len(slots), len(slots))]
    least = [text[p] @ image[CAPTION_IMAGE[p]] - margin for p in pair]
    for i, p in enumerate(pair):
        for j, other in enumerate(pair):
            similarity = image[CAPTION_IMAGE[p]] @ text[other]
            expected[0][i, j] = similarity > least[i] or similarity > least[j]
        for j, slot in enumerate(slots):
            if slot >= 0:
                expected[1][i, j] = image[CAPTION_IMAGE[p]] @ text[slot] > least[i]
                expected[2][i, j] = text[p] @ image[CAPTION_IMAGE[slot]] > least[i]
    assert all(mask.any() and not mask.all() for mask in expected)
    for mask, name in zip(expected, ("batch", "queue_text", "queue_image"), strict=True):
        before = getattr(known, name) if listed else False
        np.testing.assert_array_equal(getattr(found, name), mask | before)
    np.testing.assert_array_equal(found.weight, known.batch if listed else 0 * expected[0])
    assert teacher_of().left_out(known, pair, slots) is known

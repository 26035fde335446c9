"""Tables of known matches against the truth as a matrix, of sizes that are no multiples of 8."""

import jax
import numpy as np
import pytest

from fne_jax.objectives.features import as_probability
from fne_jax.objectives.known_matches import CompleteMatches, ListedMatches, matches_of_step

IMAGES, PAIRS = 13, 29


@pytest.fixture(scope="module")
def truth():
    """[images, pairs] bool; captions match from one image, their own, to all."""
    rng = np.random.default_rng(0)
    matrix = rng.random((IMAGES, PAIRS)) < np.linspace(0, 1, PAIRS) ** 2
    matrix[CAPTION_IMAGE, np.arange(PAIRS)] = True
    assert matrix.all(axis=0).any() and (matrix.sum(axis=0) == 1).any()
    return matrix


CAPTION_IMAGE = np.random.default_rng(1).integers(0, IMAGES, PAIRS)


def complete(truth):
    bits = np.packbits(truth.T, axis=1, bitorder="little")
    return CompleteMatches.create(bits, CAPTION_IMAGE)


def listed(truth):
    rng = np.random.default_rng(2)
    image, pair = np.nonzero(truth)
    order = rng.permutation(np.repeat(np.arange(len(image)), 2))  # each twice, in any order
    return ListedMatches.create(image[order], pair[order], CAPTION_IMAGE)


@pytest.mark.parametrize("make", [complete, listed])
def test_a_table_tells_what_the_matrix_tells(truth, make):
    match = jax.jit(lambda table, image, pair: table.match(image, pair))
    image, pair = np.indices((IMAGES, PAIRS)).astype(np.int32)
    np.testing.assert_array_equal(match(make(truth), image, pair), truth)
    np.testing.assert_array_equal(match(make(truth), image[::-1, ::-1], pair), truth[::-1])
    other = np.roll(truth, 3, axis=0)
    other[CAPTION_IMAGE, np.arange(PAIRS)] = True
    table = complete(other)
    np.testing.assert_array_equal(match(table, np.int32(5), pair[0]), other[5])


def test_a_table_is_an_argument_and_no_constant_of_the_program(truth):
    match = jax.jit(lambda table, image, pair: table.match(image, pair))
    pair = np.arange(PAIRS, dtype=np.int32)
    for matrix in (truth, ~truth):
        np.testing.assert_array_equal(match(complete(matrix), np.int32(9), pair), matrix[9])
    assert match._cache_size() == 1


@pytest.mark.parametrize("make", [complete, listed])
def test_the_pairs_of_a_step_are_looked_up_in_both_directions(truth, make):
    pair_id = np.array([3, 28, 17, 0], np.int32)
    queue_pair_id = np.array([-1, 27, 3, -1, 11, 28, 20], np.int32)
    matches = jax.jit(matches_of_step)(make(truth), pair_id, queue_pair_id)
    image, filled = CAPTION_IMAGE[pair_id], queue_pair_id >= 0
    np.testing.assert_array_equal(matches.batch, truth[np.ix_(image, pair_id)])
    assert np.diagonal(matches.batch).all()
    expected = truth[np.ix_(image, queue_pair_id)] & filled
    np.testing.assert_array_equal(matches.queue_text, expected)
    expected = truth[np.ix_(CAPTION_IMAGE[queue_pair_id], pair_id)].T & filled
    np.testing.assert_array_equal(matches.queue_image, expected)
    assert (np.asarray(matches.queue_text) != np.asarray(matches.queue_image)).any()


def test_a_pair_has_the_highest_probability_that_a_list_gives_it(truth):
    rng = np.random.default_rng(3)
    probability = rng.random(truth.shape)
    (image, pair), of_pairs = np.nonzero(truth), probability[truth]
    order = rng.permutation(2 * len(image))
    given = (np.concatenate(two)[order] for two in ((image, image), (pair, pair)))
    both = np.concatenate([of_pairs, of_pairs / 2])[order]
    table = ListedMatches.create(*given, CAPTION_IMAGE, both)
    expected = np.where(truth, np.rint(255 * probability) / 255, 0)
    expected[CAPTION_IMAGE, np.arange(PAIRS)] = 1
    found = jax.jit(ListedMatches.probability)(table, *np.indices(truth.shape).astype(np.int32))
    np.testing.assert_allclose(as_probability(found), expected, rtol=1e-6)
    assert table.grade.nbytes == truth.sum()
    pair_id = np.array([3, 28, 17, 0], np.int32)
    look_up = jax.jit(matches_of_step)
    matches = look_up(table, pair_id, np.array([-1], np.int32))
    weight = expected[np.ix_(CAPTION_IMAGE[pair_id], pair_id)]
    np.testing.assert_allclose(matches.weight, weight, rtol=1e-6)
    assert matches.batch.dtype == bool
    queue_pair_id = np.array([-1, 27, 3], np.int32)
    matches = look_up(table.replace(is_posterior=True), pair_id, queue_pair_id)
    np.testing.assert_allclose(as_probability(matches.batch), weight, rtol=1e-6)
    in_queue = expected[np.ix_(CAPTION_IMAGE[pair_id], queue_pair_id)] * (queue_pair_id >= 0)
    np.testing.assert_allclose(as_probability(matches.queue_text), in_queue, rtol=1e-6)
    in_queue = expected[np.ix_(CAPTION_IMAGE[queue_pair_id], pair_id)].T * (queue_pair_id >= 0)
    np.testing.assert_allclose(as_probability(matches.queue_image), in_queue, rtol=1e-6)
    assert matches.queue_image.dtype == np.uint8


def test_what_is_not_listed_matches_its_own_image_alone():
    table = ListedMatches.create([], [], CAPTION_IMAGE)
    image, pair = np.indices((IMAGES, PAIRS)).astype(np.int32)
    np.testing.assert_array_equal(table.match(image, pair), image == CAPTION_IMAGE[pair])


def test_tables_that_do_not_fit_the_split_are_refused():
    with pytest.raises(ValueError, match=r"bits: expected uint8 of shape \[29, ceil"):
        CompleteMatches.create(np.zeros((IMAGES, 4), np.uint8), CAPTION_IMAGE)
    for image, pair in (([0], [PAIRS]), ([-1], [0])):
        with pytest.raises(ValueError, match="image, pair: expected numbers from 0"):
            ListedMatches.create(image, pair, CAPTION_IMAGE)

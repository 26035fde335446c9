"""Blocks of keys hold what the full [batch, keys] matrix does."""

import functools

import jax
import numpy as np
import pytest

from fne_jax.objectives.features import RowSplit, directions
from fne_jax.objectives.fne_loss import fne_triplet_loss
from fne_jax.objectives.key_blocks import BLOCK, KeyBlocks
from fne_jax.objectives.similarity_statistics import SimilarityStatistics
from fne_jax.parallel.sharding import StepLayout
from tests.support.fne import keys_of, make_batch
from tests.support.runs import mesh_of


def weigh(similarity, positive, same_image, posterior=None):
    return abs(similarity - 2 * positive) * ~same_image, ~same_image & (similarity < 0.2)


@functools.partial(jax.jit, static_argnames="key_chunk")
def blocks_of(features, queue, key_chunk):
    """Returns the table, and the scores of every block, of the image anchors."""
    direction, _ = directions(features, queue)
    blocks = KeyBlocks(direction, features.split, weigh)
    table = blocks.table(key_chunk)
    batch, count = table[0].shape
    numbers = jax.numpy.arange(count)
    number_of_all = functools.partial(jax.numpy.full, (batch,))
    return table, jax.vmap(lambda number: blocks.scores(number_of_all(number)))(numbers)


def test_blocks_are_slices_of_the_full_matrix():
    features, queue = make_batch(3, batch=19, dim=7, queue_size=45, filled=45, images=6)
    anchor, keys, key_id = keys_of(features, queue)[0]
    similarity = anchor @ keys.T
    same = features.image_id[:, None] == key_id[None, :]
    weight, candidate = weigh(similarity, np.diagonal(similarity)[:, None], same)
    assert (candidate != ~same).any()
    # The last block of the batch's keys and of the queue's is short.
    borders = [(0, 16), (16, 19), (19, 35), (35, 51), (51, 64)]
    for key_chunk in (None, BLOCK):
        (weights, best), scores = blocks_of(features, queue, key_chunk)
        assert weights.shape == (19, len(borders))
        for block, (start, end) in enumerate(borders):
            part = slice(start, end)
            np.testing.assert_allclose(
                weights[:, block], weight[:, part].sum(axis=1), rtol=1e-5, atol=1e-6
            )
            others = np.where(candidate, similarity, -np.inf)[:, part]
            np.testing.assert_allclose(best[:, block], others.max(axis=1), rtol=1e-5, atol=1e-6)
            size = end - start
            index, found, weighed, other = (np.asarray(array[block]) for array in scores)
            assert (index[:, :size] == np.arange(start, end)).all()
            np.testing.assert_allclose(found[:, :size], similarity[:, part], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(weighed[:, :size], weight[:, part], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(other[:, :size], candidate[:, part])
            assert (weighed[:, size:] == 0).all() and not other[:, size:].any()


@pytest.mark.parametrize(("queue_size", "key_chunk"), [(256, None), (256, 128), (200, None)])
def test_devices_that_share_the_queue_choose_what_one_does(queue_size, key_chunk):
    features, queue = make_batch(5, batch=16, dim=7, queue_size=queue_size, filled=190, images=9)
    layout = StepLayout(mesh_of(2, 4))

    @jax.jit
    def choose(features):
        stats = SimilarityStatistics.create()
        return fne_triplet_loss(features, queue, stats, jax.random.key(3), key_chunk=key_chunk)

    split = features.replace(split=RowSplit(8, layout.rows))
    text = choose.lower(split).compile().as_text()
    # Each device scores its eighth of each chunk for all 16 anchors, where it divides into blocks.
    shared = (key_chunk or queue_size) // 8
    assert (f"f32[{shared},16]" in text) == (queue_size == 256)
    (loss, aux), (expected_loss, expected) = choose(split), choose(features)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_array_equal(aux.negative_i2t, expected.negative_i2t)
    np.testing.assert_array_equal(aux.negative_t2i, expected.negative_t2i)

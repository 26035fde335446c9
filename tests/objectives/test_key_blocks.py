"""Blocks of keys hold what the full [batch, keys] matrix does."""

import functools

import jax
import numpy as np

from fne_jax.objectives.features import directions
from fne_jax.objectives.key_blocks import BLOCK, KeyBlocks
from tests.support.fne import keys_of, make_batch


def weigh(similarity, positive, same_image):
    return abs(similarity - 2 * positive) * ~same_image


@functools.partial(jax.jit, static_argnames="key_chunk")
def blocks_of(features, queue, key_chunk):
    """Returns the table, and the scores of every block, of the image anchors."""
    direction, _ = directions(features, queue)
    blocks = KeyBlocks.create(direction, features.image_id, queue)
    table = blocks.table(weigh, key_chunk)
    batch, count = table.weight.shape
    numbers = jax.numpy.arange(count)
    number_of_all = functools.partial(jax.numpy.full, (batch,))
    return table, jax.vmap(lambda number: blocks.scores(number_of_all(number), weigh))(numbers)


def test_blocks_are_slices_of_the_full_matrix():
    features, queue = make_batch(3, batch=19, dim=7, queue_size=45, filled=45, images=6)
    anchor, keys, key_id = keys_of(features, queue)[0]
    similarity = anchor @ keys.T
    same = features.image_id[:, None] == key_id[None, :]
    weight = weigh(similarity, np.diagonal(similarity)[:, None], same)
    # The last block of the batch's keys and of the queue's is short.
    borders = [(0, 16), (16, 19), (19, 35), (35, 51), (51, 64)]
    for key_chunk in (None, BLOCK):
        table, scores = blocks_of(features, queue, key_chunk)
        assert table.weight.shape == (19, len(borders))
        for block, (start, end) in enumerate(borders):
            part = slice(start, end)
            np.testing.assert_allclose(
                table.weight[:, block], weight[:, part].sum(axis=1), rtol=1e-5, atol=1e-6
            )
            others = np.where(same, -np.inf, similarity)[:, part]
            np.testing.assert_allclose(
                table.best[:, block], others.max(axis=1), rtol=1e-5, atol=1e-6
            )
            size = end - start
            index, found, weighed, other = (np.asarray(array[block]) for array in scores)
            assert (index[:, :size] == np.arange(start, end)).all()
            np.testing.assert_allclose(found[:, :size], similarity[:, part], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(weighed[:, :size], weight[:, part], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(other[:, :size], ~same[:, part])
            assert (weighed[:, size:] == 0).all() and not other[:, size:].any()

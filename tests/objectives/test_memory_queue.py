"""The queue is a ring."""

import jax
import numpy as np
import pytest

from fne_jax import MemoryQueue
from tests.support.fne import matching_rows

enqueue = jax.jit(MemoryQueue.enqueue)


def test_queue_is_a_ring():
    rng = np.random.default_rng(0)
    queue = MemoryQueue.create(jax.random.key(0), 7, 3)
    np.testing.assert_allclose(np.linalg.norm(queue.image, axis=1), 1, rtol=1e-5)
    assert (np.asarray(queue.image_id) == -1).all()
    expected = [-1] * 7
    slot = 0
    for step in range(5):
        image, text = matching_rows(rng, 3, 3)
        ids = np.arange(3) + 10 * step
        queue = enqueue(queue, image, text, ids, ids + 100)
        for row in range(3):
            expected[slot] = ids[row]
            np.testing.assert_array_equal(queue.image[slot], image[row])
            np.testing.assert_array_equal(queue.text[slot], text[row])
            slot = (slot + 1) % 7
    assert queue.image_id.tolist() == expected
    assert queue.pair_id.tolist() == [i + 100 for i in expected]
    assert queue.pointer == slot
    unchanged = enqueue(queue, image, text, ids, ids, where=False)
    jax.tree.map(np.testing.assert_array_equal, unchanged, queue)


def test_queue_refuses_what_does_not_fit():
    queue = MemoryQueue.create(jax.random.key(0), 4, 3)
    rows = np.ones((5, 3), np.float32)
    with pytest.raises(ValueError, match="at most 4 rows, got 5"):
        queue.enqueue(rows, rows, np.arange(5))
    with pytest.raises(ValueError, match="expected dim 3, got 2"):
        queue.enqueue(rows[:2, :2], rows[:2, :2], np.arange(2))
    with pytest.raises(ValueError, match="size: expected a number in"):
        MemoryQueue.create(jax.random.key(0), 0, 3)

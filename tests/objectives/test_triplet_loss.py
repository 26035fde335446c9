"""The triplet losses beside plain loops."""

import jax
import numpy as np

import fne_jax
from fne_jax import Features
from fne_jax.objectives.triplet_loss import take_keys
from tests.support.fne import matching_rows


def test_hardest_negative_loss_is_the_plain_double_loop():
    rng = np.random.default_rng(1)
    image, text = matching_rows(rng, 5, 4, noise=1.0)
    ids = np.array([0, 1, 1, 2, 3])
    same = ids[:, None] == ids[None, :]
    s = image @ text.T
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if not same[i, j]]
        expected += max(0.0, *(0.2 + s[i, j] - s[i, i] for j in others))
        expected += max(0.0, *(0.2 + s[j, i] - s[i, i] for j in others))
    loss_fn = jax.jit(fne_jax.hardest_negative_triplet_loss)
    loss, _ = loss_fn(Features(image, text, same_image=same))
    np.testing.assert_allclose(loss, expected / 5, rtol=1e-5)
    assert loss_fn(Features(image, text))[0] != loss


def test_indices_name_the_batchs_keys_first_and_then_the_queues():
    batch_keys, queue_keys = np.arange(6.0).reshape(3, 2), 10 + np.arange(8.0).reshape(4, 2)
    keys = np.concatenate([batch_keys, queue_keys])
    for index in ([0, 2, 1], [3, 6, 2]):
        np.testing.assert_array_equal(
            take_keys(np.array(index), batch_keys, queue_keys), keys[index]
        )
    taken = take_keys(np.array([2, 0, 1]), batch_keys, None)
    np.testing.assert_array_equal(taken, keys[[2, 0, 1]])

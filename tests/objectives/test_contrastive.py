"""The contrastive losses beside plain loops."""

import jax
import numpy as np

import fne_jax
from fne_jax import Features, MemoryQueue
from tests.support.fne import assert_gradient, keys_of, make_batch, matching_rows

IDS = np.array([0, 1, 1, 2, 3])
SAME = IDS[:, None] == IDS[None, :]


def pairs():
    return matching_rows(np.random.default_rng(1), 5, 4, noise=1.0)


def test_infonce_is_cross_entropy_over_other_images():
    features, queue = make_batch(4)
    total = 0.0
    for anchor, keys, key_id in keys_of(features, queue):
        for i in range(6):
            others = [
                anchor[i] @ keys[j]
                for j in range(len(keys))
                if key_id[j] not in (-1, features.image_id[i])
            ]
            logits = np.array([anchor[i] @ keys[i], *others]) / 0.3
            total += np.log(np.exp(logits).sum()) - logits[0]

    @jax.jit
    def differentiate(image, queue):
        return jax.value_and_grad(
            lambda image: fne_jax.infonce_loss(
                features.replace(image=image), queue, temperature=0.3
            )[0]
        )(image)

    loss, grads = differentiate(features.image, queue)
    np.testing.assert_allclose(loss, total / 12, rtol=1e-5)
    assert np.isfinite(grads).all() and (np.asarray(grads) != 0).any()
    in_batch, _ = differentiate(features.image, None)
    empty = MemoryQueue.create(jax.random.key(0), 11, 9)
    over_empty, masked_grads = differentiate(features.image, empty)
    np.testing.assert_allclose(over_empty, in_batch, rtol=1e-6)
    assert np.isfinite(masked_grads).all()


def test_clip_loss_is_cross_entropy_within_the_batch():
    image, text = pairs()
    s = np.asarray(image @ text.T, np.float64) / 0.3
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or not SAME[i, j]]
        total += np.log(np.exp(s[i, others]).sum()) - s[i, i]
        total += np.log(np.exp(s[others, i]).sum()) - s[i, i]

    @jax.jit
    def differentiate(same_image):
        return jax.value_and_grad(
            lambda *x: fne_jax.clip_loss(Features(*x, same_image=same_image), temperature=0.3)[0],
            (0, 1),
        )(image, text)

    loss, grads = differentiate(SAME)
    np.testing.assert_allclose(loss, total / 10, rtol=1e-5)
    assert all(np.isfinite(g).all() and (np.asarray(g) != 0).any() for g in grads)
    assert differentiate(None)[0] > loss


def test_sigmoid_loss_judges_each_pair():
    image, text = pairs()
    logits = np.asarray(image @ text.T, np.float64) / 0.4 - 2.0
    total = 0.0
    for i, j in np.ndindex(5, 5):
        if i == j:
            total += np.log1p(np.exp(-logits[i, j]))
        elif not SAME[i, j]:
            total += np.log1p(np.exp(logits[i, j]))

    def loss_fn(image, text, temperature, bias):
        features = Features(image, text, same_image=SAME)
        return fne_jax.sigmoid_loss(features, temperature=temperature, bias=bias)[0]

    differentiate = jax.jit(jax.value_and_grad(loss_fn, (0, 1, 2, 3)))
    arguments = image, text, np.float32(0.4), np.float32(-2.0)
    loss, grads = differentiate(*arguments)
    np.testing.assert_allclose(loss, total / 5, rtol=1e-5)
    assert all((np.asarray(grad) != 0).any() for grad in grads)
    assert_gradient(differentiate, arguments)

"""The loss of FNE against plain loops, in chunks, over devices, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fne_jax
from fne_jax import Features, Matches, MemoryQueue
from fne_jax.objectives.fne_loss import _loss_from_uniforms
from fne_jax.objectives.similarity_statistics import cosine
from fne_jax.objectives.triplet_loss import rowwise_cosine
from tests.support.fne import (
    arguments_of,
    assert_gradient,
    excluded_of,
    keys_of,
    make_batch,
    matching_rows,
    slow_loss,
    slow_posterior,
    statistics,
)

TRUSTED = statistics()


@functools.partial(jax.jit, static_argnames=("margin", "key_chunk"))
def differentiate(
    uniforms, features, queue, stats, margin=0.2, key_chunk=None, elimination_tau=None
):
    """Returns (loss, aux) and the gradient for all four embeddings."""

    def loss_fn(*embeddings):
        drawn = Features(*embeddings, features.image_id)
        settings = {"margin": margin, "key_chunk": key_chunk, "elimination_tau": elimination_tau}
        return _loss_from_uniforms(uniforms, drawn, queue, stats, **settings)

    embeddings = arguments_of(features)[:4]
    return jax.value_and_grad(loss_fn, (0, 1, 2, 3), has_aux=True)(*embeddings)


def uniforms_of(seed, batch):
    return np.random.default_rng(seed).random((2, batch)).astype(np.float32)


@pytest.mark.parametrize("positive_mean", [0.3, 0.7, 1.3])  # at 1.3 nothing can be sampled
def test_loss_agrees_with_the_slow_version(positive_mean):
    stats = statistics((positive_mean, 0.01), (0.2, 0.02), counts=(500, 999))
    for seed in range(6):
        features, queue = make_batch(seed)
        uniforms = uniforms_of(seed, 6)
        (loss, aux), _ = differentiate(uniforms, features, queue, stats, 0.4)
        expected, chosen = slow_loss(uniforms, features, queue, stats, 0.4)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_array_equal(aux.negative_i2t, chosen[0])
        np.testing.assert_array_equal(aux.negative_t2i, chosen[1])
        assert (aux.fallback_fraction == 1) == (positive_mean == 1.3)


@pytest.mark.parametrize("elimination_tau", [1e30, 1e6])
def test_what_is_eliminated_is_no_fallback_either(elimination_tau):
    stats = statistics((0.7, 0.02), (0.2, 0.01), counts=(500, 999))
    suspect_fallbacks = rows_without_any = 0
    for seed in range(4):
        features, queue = make_batch(seed, dim=3, queue_size=37)
        uniforms = uniforms_of(seed, 6)
        for slots, chunk in ((queue, 16), (None, None)):
            soft, hard = (
                differentiate(uniforms, features, slots, stats, 0.4, chunk, tau)
                for tau in (0.5, elimination_tau)
            )
            (loss, aux), grads = hard
            expected, chosen = slow_loss(uniforms, features, slots, stats, 0.4, eliminated=1e-3)
            np.testing.assert_allclose(loss, expected, rtol=1e-5)
            np.testing.assert_array_equal(aux.negative_i2t, chosen[0])
            np.testing.assert_array_equal(aux.negative_t2i, chosen[1])
            posteriors = []
            assert all(np.isfinite(grad).all() for grad in grads)
            for (anchor, keys, _), excluded, grad, negative, counts, hardest in zip(
                keys_of(features, slots),
                excluded_of(features, slots),
                grads[:2],
                chosen,
                (aux.counts_i2t, aux.counts_t2i),
                (aux.hardest_i2t, aux.hardest_t2i),
                strict=True,
            ):
                s = anchor @ keys.T
                posterior = slow_posterior(s.astype(np.float64), stats, 1e-4)
                none = (excluded | (posterior > 1e-3)).all(axis=1)
                assert (grad[none] == 0).all()
                np.testing.assert_array_equal(np.asarray(hardest) == -1, none)
                assert not counts[none].any()
                posteriors += [posterior[row, negative[row]] for row in np.flatnonzero(counts)]
                rows_without_any += none.sum()
            np.testing.assert_allclose(aux.posterior, np.mean(posteriors), rtol=1e-3)
            suspect_fallbacks += float(soft[0][1].fallback_fraction < aux.fallback_fraction)
    assert suspect_fallbacks and rows_without_any


@pytest.mark.parametrize("key_chunk", [16, 48, 112, 4096])
def test_chunks_of_keys_change_nothing(key_chunk):
    features, queue = make_batch(
        11, batch=19, dim=7, queue_size=16 * 7 + 5, filled=16 * 7, images=30
    )
    uniforms = uniforms_of(1, 19)
    for positive_mean in (0.4, 1.3):  # at 1.3 nothing can be sampled
        stats = statistics((positive_mean, 0.02), (0.2, 0.02), counts=(500, 999))
        at_once, chunked = (
            differentiate(uniforms, features, queue, stats, key_chunk=chunk)
            for chunk in (None, key_chunk)
        )
        (loss, aux), grads = at_once
        (chunked_loss, chunked_aux), chunked_grads = chunked
        for name in ("negative_i2t", "negative_t2i", "hardest_i2t", "hardest_t2i"):
            np.testing.assert_array_equal(getattr(chunked_aux, name), getattr(aux, name))
        assert max(aux.negative_i2t) > 19, "the case should reach into the queue"
        np.testing.assert_allclose(chunked_loss, loss, rtol=1e-6)
        for ours, theirs in zip(chunked_grads, grads, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
        # Both agree with the plain loops.
        expected, chosen = slow_loss(uniforms, features, queue, stats, 0.2)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_array_equal(aux.negative_i2t, chosen[0])
        np.testing.assert_array_equal(aux.negative_t2i, chosen[1])


def test_chunks_of_keys_bound_the_memory():
    batch, queue_size, dim = 64, 131_072 - 64, 96
    shaped = jax.ShapeDtypeStruct
    emb, ids = shaped((batch, dim), jnp.float32), shaped((batch,), jnp.int32)
    queue = jax.eval_shape(lambda: MemoryQueue.create(jax.random.key(0), queue_size, dim))
    uniforms = shaped((2, batch), jnp.float32)

    def scratch_mib(key_chunk):
        compiled = differentiate.lower(
            uniforms,
            Features(emb, emb, emb, emb, ids),
            queue,
            TRUSTED,
            key_chunk=key_chunk,
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    matrix_mib = batch * (batch + queue_size) * 4 / 2**20
    assert matrix_mib == 32
    assert scratch_mib(4096) < matrix_mib / 2
    assert scratch_mib(None) > matrix_mib


@pytest.mark.parametrize("key_chunk", [None, 32])
def test_eight_devices_sample_what_one_samples(key_chunk):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    features, queue = make_batch(3, batch=16, dim=9, queue_size=77, filled=77, images=40)
    jitted = jax.jit(functools.partial(fne_jax.fne_triplet_loss, margin=0.4, key_chunk=key_chunk))
    loss, aux = jitted(features, queue, TRUSTED, jax.random.key(7))
    sharded_loss, sharded_aux = jitted(
        jax.device_put(features, rows),
        jax.device_put(queue, replicated),
        TRUSTED,
        jax.random.key(7),
    )
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    for name in ("negative_i2t", "negative_t2i"):
        np.testing.assert_array_equal(getattr(sharded_aux, name), getattr(aux, name))


def test_gradient_is_that_of_the_chosen_triplets():
    features, queue = make_batch(2)
    uniforms = uniforms_of(2, 6)

    def loss_and_gradient(image, text):
        moved = features.replace(image=image, text=text)
        (loss, _), grads = differentiate(uniforms, moved, queue, TRUSTED, 0.4)
        for momentum_grad in grads[2:]:
            np.testing.assert_array_equal(momentum_grad, 0)
        assert all((np.asarray(grad) != 0).any() for grad in grads[:2])
        return loss, grads[:2]

    assert_gradient(loss_and_gradient, (features.image, features.text))


def test_a_lone_pair_without_a_queue_has_no_loss():
    image, text = matching_rows(np.random.default_rng(0), 1, 5)
    loss, aux = jax.jit(fne_jax.fne_triplet_loss)(
        Features(image, text, image, text, np.array([3])), None, TRUSTED, jax.random.key(0)
    )
    assert loss == 0 and aux.fallback_fraction == 1


def test_backward_pass_has_no_product_over_the_keys():
    features, queue = make_batch(0, queue_size=1009)

    def loss_fn(image, text):
        moved = features.replace(image=image, text=text)
        return fne_jax.fne_triplet_loss(moved, queue, TRUSTED, jax.random.key(0))[0]

    def dots_over_keys(function):
        text = str(jax.make_jaxpr(function)(features.image, features.text))
        return sum("dot_general" in line and "1009" in line for line in text.splitlines())

    assert dots_over_keys(loss_fn) == dots_over_keys(jax.grad(loss_fn, (0, 1))) == 2


def test_every_setting_reaches_the_loss():
    features, queue = make_batch(5)
    settings = {
        "margin": 0.3, "tau": 0.7, "elimination_tau": 0.9, "prior": 0.1,
        "posterior_threshold": 0.2, "min_count": 5, "monotone": True, "key_chunk": 16,
    }  # fmt: skip
    rng = jax.random.key(3)

    def program(**settings):
        return str(
            jax.make_jaxpr(lambda f: fne_jax.fne_triplet_loss(f, queue, TRUSTED, rng, **settings))(
                features
            )
        )

    replay = jax.make_jaxpr(
        lambda f: _loss_from_uniforms(
            jax.random.uniform(rng, (2, 6)), f, queue, TRUSTED, **settings
        )
    )(features)
    assert program(**settings) == str(replay)
    for name in settings:
        chunked = {"key_chunk": 16} if name == "key_chunk" else {}
        assert (program(**{name: settings[name]}) == program()) == bool(chunked), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": -0.1}, "margin: expected a number in"),
        ({"prior": 0.0}, r"prior: expected a number in \(0, 1\), got 0.0"),
        ({"key_chunk": 24}, "key_chunk: expected a multiple of 16 or None, got 24"),
        ({"text": np.ones((5, 9), np.float32)}, r"text: expected shape \(6, 9\) as image has"),
        ({"image_id": np.ones(6, np.float32)}, "image_id: expected an integer dtype, got float32"),
        ({"image": np.ones((6, 9), np.int32)}, "image: expected a float dtype"),
        ({"image": np.ones((0, 9), np.float32)}, "image: expected at least one row, got none"),
        ({"image_id": [1] * 6}, "image_id: expected an array, got a list"),
        ({"same_image": np.eye(6, dtype=int)}, "same_image: expected a bool dtype, got int"),
        ({"matches": Matches(np.eye(6, dtype="i"))}, "matches.batch: expected a bool dtype, got i"),
        ({"momentum_text": None}, "momentum_text, image_id: expected arrays, as this loss"),
        ({"queue": make_batch(0, dim=8)[1]}, "queue.image: expected shape"),
        (
            {"matches": Matches(np.eye(6, dtype="u1"), *[np.ones((6, 11), bool)] * 2)},
            "matches.queue_text: expected the dtype of matches.batch, got bool",
        ),
    ],
)
def test_wrong_arguments_are_named_while_tracing(change, message):
    features, queue = make_batch(0)
    of_batch = {name: value for name, value in change.items() if hasattr(features, name)}
    settings = {name: value for name, value in change.items() if name not in of_batch}
    arguments = {"queue": queue, "stats": TRUSTED, "rng": jax.random.key(0), **settings}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: fne_jax.fne_triplet_loss(features.replace(**of_batch), **arguments))


def test_uniform_numbers_of_another_batch_are_refused():
    features, queue = make_batch(0)
    with pytest.raises(ValueError, match=r"uniforms: expected shape \(2, 6\), got \(2, 5\)"):
        _loss_from_uniforms(np.zeros((2, 5), "f"), features, queue, TRUSTED)


def test_half_precision_embeddings_are_compared_in_float32():
    features, queue = make_batch(1)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arguments_of(features)[:4])
    loss, _ = jax.eval_shape(
        lambda: fne_jax.fne_triplet_loss(
            Features(*half, features.image_id), queue, TRUSTED, jax.random.key(0)
        )
    )
    assert loss.dtype == jnp.float32
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    for product in (jax.jit(cosine), jax.jit(rowwise_cosine)):
        np.testing.assert_allclose(product(*half[:2]), product(*rounded[:2]), atol=1e-6)

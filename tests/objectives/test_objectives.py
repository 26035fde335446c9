"""Statistics, posterior, weights, draws, losses and queue on uneven shapes and edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats as scipy_stats

import fne_jax
from fne_jax import MemoryQueue, SimilarityStatistics
from fne_jax.objectives.similarity_statistics import GaussianStatistics


def unit_rows(rng, rows, dim):
    vectors = rng.normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def matching_rows(rng, rows, dim, noise=0.5):
    image = unit_rows(rng, rows, dim)
    text = image + noise * unit_rows(rng, rows, dim)
    return jnp.asarray(image), jnp.asarray(text / np.linalg.norm(text, axis=1, keepdims=True))


def gaussian(count, mean, variance):
    return GaussianStatistics(
        jnp.float32(count), jnp.float32(count * mean), jnp.float32((count - 1) * variance)
    )


TRUSTED = SimilarityStatistics(gaussian(500, 0.7, 0.01), gaussian(1000, 0.4, 0.02))


# A slow, loop-by-loop version of the method to compare with.


def slow_statistics(batches, same_images):
    """Follows design section 3, step 1 pair by pair over several batches."""
    acc = {"p": [0, 0.0, 0.0], "n": [0, 0.0, 0.0]}
    for (image, text), same in zip(batches, same_images, strict=True):
        s = np.asarray(image, np.float64) @ np.asarray(text, np.float64).T
        size = len(s)
        found = {"p": [], "n": []}
        for i in range(size):
            row = [j for j in range(size) if j == i or not same[i, j]]
            if max(row, key=lambda j: (s[i, j], -j)) != i:
                continue
            if max(row, key=lambda j: (s[j, i], -j)) != i:
                continue
            found["p"].append(s[i, i])
            found["n"].append(max(0.0 if same[i, j] else s[i, j] for j in range(size)))
            found["n"].append(max(0.0 if same[i, j] else s[j, i] for j in range(size)))
        for kind, values in found.items():
            acc[kind][0] += len(values)
            acc[kind][1] += sum(values)
            mean = acc[kind][1] / acc[kind][0] if acc[kind][0] else 0.0
            acc[kind][2] += sum((v - mean) ** 2 for v in values)
    return [
        (n, total / n if n else 0.0, dev / (n - 1) if n > 1 else 0.0)
        for n, total, dev in acc.values()
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_statistics_agree_with_the_slow_version(seed, size):
    rng = np.random.default_rng([seed, size])
    stats, batches, same_images = SimilarityStatistics.create(), [], []
    for _ in range(3):
        image, text = matching_rows(rng, size, 6, noise=1.5)
        ids = rng.integers(0, max(size - 1, 1), size)
        same = ids[:, None] == ids[None, :]
        batches.append((image, text))
        same_images.append(same)
        stats = fne_jax.update_similarity_statistics(stats, image, text, same)
    for gaussian_stats, (count, mean, variance) in zip(
        (stats.positive, stats.negative), slow_statistics(batches, same_images), strict=True
    ):
        assert gaussian_stats.count == count
        np.testing.assert_allclose(gaussian_stats.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gaussian_stats.variance, variance, rtol=1e-4, atol=1e-6)


def test_no_mutual_top_match_leaves_statistics_alone():
    image = np.eye(3, dtype=np.float32)
    text = np.roll(image, 1, axis=0)
    stats = fne_jax.update_similarity_statistics(TRUSTED, image, text)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), stats, TRUSTED))


def test_identical_embeddings_have_one_mutual_match():
    ones = np.ones((4, 4), np.float32) / 2
    stats = fne_jax.update_similarity_statistics(SimilarityStatistics.create(), ones, ones)
    assert stats.positive.count == 1 and stats.negative.count == 2
    assert stats.positive.variance == 0


def test_decayed_statistics_forget():
    rng = np.random.default_rng(0)
    image, text = matching_rows(rng, 7, 5, noise=0.1)
    stats = SimilarityStatistics.create()
    for _ in range(60):
        stats = fne_jax.update_similarity_statistics(stats, image, text, keep=0.5)
    np.testing.assert_allclose(stats.positive.count, 14, rtol=1e-5)  # 7 / (1 - 0.5)
    np.testing.assert_allclose(stats.positive.mean, (image * text).sum(axis=1).mean(), rtol=1e-5)


def test_posterior_is_bayes_rule():
    similarity = np.linspace(-1, 1, 41)
    density = {
        name: scipy_stats.norm(g.mean, np.sqrt(g.variance)).pdf(similarity)
        for name, g in (("p", TRUSTED.positive), ("n", TRUSTED.negative))
    }
    expected = 0.01 * density["p"] / (0.01 * density["p"] + 0.99 * density["n"])
    ours = fne_jax.false_negative_posterior(similarity, TRUSTED, 0.01)
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("variance", [0.0, 1e-12, 1e-4, 0.5])
def test_posterior_is_a_probability_everywhere(variance):
    stats = SimilarityStatistics(gaussian(300, 0.9, variance), gaussian(600, 0.1, 1e-6))
    similarity = jnp.array([-1.0, -0.5, 0.0, 0.1, 0.5, 0.9, 1.0, 1e3, -1e3])
    posterior = fne_jax.false_negative_posterior(similarity, stats)
    assert np.isfinite(posterior).all() and (posterior >= 0).all() and (posterior <= 1).all()


def test_posterior_is_the_prior_until_two_values_are_seen():
    one = SimilarityStatistics(gaussian(1, 0.9, 0.0), gaussian(2, 0.1, 0.1))
    np.testing.assert_array_equal(
        fne_jax.false_negative_posterior(jnp.array([0.0, 0.9]), one, 0.03), np.float32(0.03)
    )


@pytest.mark.parametrize("monotone", [False, True])
def test_posterior_has_no_gradient(monotone):
    def total(similarity):
        return fne_jax.false_negative_posterior(similarity, TRUSTED, 0.5, monotone=monotone).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.linspace(-1, 1, 9)), 0)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [((0.7, 0.01), (0.4, 0.03)), ((0.7, 0.03), (0.4, 0.01)), ((0.7, 0.02), (0.4, 0.02)),
     ((0.3, 0.02), (0.5, 0.02)), ((0.3, 0.01), (0.5, 0.03)), ((0.3, 0.03), (0.5, 0.01))],
)  # fmt: skip
def test_monotone_posterior_never_falls(positive, negative):
    stats = SimilarityStatistics(gaussian(500, *positive), gaussian(500, *negative))
    similarity = jnp.linspace(-1, 1, 2001)
    posterior = np.asarray(fne_jax.false_negative_posterior(similarity, stats, 0.1, monotone=True))
    assert (np.diff(posterior) >= -1e-6).all() and np.isfinite(posterior).all()
    if positive[1] != negative[1]:
        authors = np.asarray(fne_jax.false_negative_posterior(similarity, stats, 0.1))
        assert (np.diff(authors) < 0).any(), "the case should need the monotone form"
        rising = np.diff(authors) > 1e-6
        if positive[0] > negative[0]:
            np.testing.assert_allclose(posterior[1:][rising], authors[1:][rising], atol=1e-5)


def slow_weights(s, d, same, stats, margin, decay, prior, threshold, min_count):
    out = np.zeros_like(s)
    for i, j in np.ndindex(*s.shape):
        if same[i, j] or s[i, j] <= float(stats.positive.mean) - margin:
            continue
        p = float(fne_jax.false_negative_posterior(s[i, j], stats, prior))
        if float(stats.positive.count) > min_count and p > threshold:
            out[i, j] = np.exp(-decay * p)
        else:
            out[i, j] = np.exp(-decay * (s[i, j] - d[i]) ** 2)
    return out


@pytest.mark.parametrize("min_count", [200, 700])
def test_weights_agree_with_the_slow_version(min_count):
    rng = np.random.default_rng(3)
    s = rng.uniform(-0.2, 1, (4, 23)).astype(np.float32)
    d = rng.uniform(0.5, 0.9, 4).astype(np.float32)
    same = rng.random((4, 23)) < 0.2
    settings = {"margin": 0.3, "decay": 0.7, "prior": 0.02, "posterior_threshold": 0.1}
    ours = fne_jax.sampling_weights(s, d, same, TRUSTED, min_count=min_count, **settings)
    slow = slow_weights(s, d, same, TRUSTED, *settings.values(), min_count)
    np.testing.assert_allclose(ours, slow, rtol=1e-5)
    assert (slow == 0).any() and (slow > 0).any()


def test_parts_of_the_weights_can_be_switched_off():
    s = np.array([[0.55, 0.72, 0.95]], np.float32)
    d, same = np.array([0.8], np.float32), np.zeros((1, 3), bool)
    args = (s, d, same, TRUSTED)
    posterior = fne_jax.false_negative_posterior(s, TRUSTED, 0.5)
    cutdown = np.exp(-0.5 * (s - 0.8) ** 2)
    off = fne_jax.sampling_weights(*args, prior=0.5, posterior_threshold=1.0)
    np.testing.assert_allclose(off, cutdown, rtol=1e-6)
    uniform = fne_jax.sampling_weights(
        *args, prior=0.5, posterior_threshold=0.8, decay=0.0, elimination_decay=0.5
    )
    expected = np.where(posterior > 0.8, np.exp(-0.5 * posterior), 1.0)
    np.testing.assert_allclose(uniform, expected, rtol=1e-6)
    hard = fne_jax.sampling_weights(
        *args, prior=0.5, posterior_threshold=0.8, elimination_decay=1e30
    )
    np.testing.assert_array_equal(np.asarray(hard) == 0, posterior > 0.8)


def slow_draw(uniform, weights, fallback):
    drawn = []
    for u, row, instead in zip(uniform, weights.astype(np.float64), fallback, strict=True):
        running = np.cumsum(row)
        hits = np.flatnonzero((row > 0) & (running > u * running[-1]))
        drawn.append(hits[0] if len(hits) else instead)
    return np.array(drawn)


@pytest.mark.parametrize("keys", [1, 5, 127, 128, 129, 300, 1000])
def test_draws_agree_with_the_slow_version(keys):
    rng = np.random.default_rng(keys)
    # Multiples of 1/64 add up exactly, so that both versions see the same borders.
    weights = (rng.integers(0, 65, (64, keys)) / 64 * (rng.random((64, keys)) < 0.3)).astype("f")
    weights[::9] = 0
    uniform = rng.random(64).astype(np.float32)
    fallback = rng.integers(0, keys, 64)
    ours = fne_jax.sample_negatives_from_uniform(uniform, weights, fallback)
    np.testing.assert_array_equal(ours, slow_draw(uniform, weights, fallback))


def test_draws_are_proportional_to_the_weights():
    rng = np.random.default_rng(0)
    weights = rng.random(301).astype(np.float32) * (rng.random(301) < 0.5)
    draws = 200_000  # in rows of 1,000
    rows = jnp.broadcast_to(weights, (1000, 301))
    sample = jax.jit(fne_jax.sample_negatives)
    keys = jax.random.split(jax.random.key(1), draws // 1000)
    drawn = np.concatenate([sample(key, rows, jnp.zeros(1000, jnp.int32)) for key in keys])
    counts = np.bincount(drawn, minlength=301)
    assert (counts[weights == 0] == 0).all()
    expected = draws * weights.astype(np.float64) / weights.sum(dtype=np.float64)
    assert scipy_stats.chisquare(counts[weights > 0], expected[weights > 0]).pvalue > 1e-3


def test_never_draws_a_zero_weight_among_many_keys():
    keys = 131_072
    rng = np.random.default_rng(5)
    weights = np.zeros((32, keys), np.float32)
    for row in weights:
        row[rng.choice(keys, 40, replace=False)] = rng.random(40) + 1e-3
    sample = jax.jit(fne_jax.sample_negatives_from_uniform)
    edge = np.float32(1) - np.float32(2) ** -24
    for uniform in (np.zeros(32, np.float32), np.full(32, edge), rng.random(32).astype("f")):
        drawn = np.asarray(sample(uniform, weights, np.zeros(32, np.int32)))
        assert (weights[np.arange(32), drawn] > 0).all()


def test_draw_is_reproducible_and_uses_the_fallback():
    weights = np.ones((3, 700), np.float32)
    weights[1] = 0
    fallback = np.array([1, 2, 3])
    first, again = (
        fne_jax.sample_negatives(jax.random.key(4), weights, fallback) for _ in range(2)
    )
    np.testing.assert_array_equal(first, again)
    assert first[1] == 2
    other = fne_jax.sample_negatives(jax.random.key(5), weights, fallback)
    assert (other != first).any()


def make_batch(seed, batch=6, dim=9, queue_size=11, images=4):
    rng = np.random.default_rng(seed)
    image, text = matching_rows(rng, batch, dim)
    momentum_image, momentum_text = matching_rows(rng, batch, dim)
    image_id = rng.integers(0, images, batch).astype(np.int32)
    queue = MemoryQueue.create(jax.random.key(seed), queue_size, dim)
    queue = queue.enqueue(*matching_rows(rng, 7, dim), rng.integers(0, images, 7).astype(np.int32))
    return image, text, momentum_image, momentum_text, image_id, queue


def slow_loss(uniforms, image, text, momentum_image, momentum_text, image_id, queue, stats, margin):
    total, chosen = 0.0, []
    keys_of = (
        (image, momentum_text, queue.text, uniforms[0]),
        (text, momentum_image, queue.image, uniforms[1]),
    )
    for anchor, batch_keys, queue_keys, uniform in keys_of:
        keys = np.concatenate([batch_keys, queue_keys])
        key_id = np.concatenate([image_id, queue.image_id])
        s = anchor @ keys.T
        d = (anchor * batch_keys).sum(axis=1)
        same = image_id[:, None] == key_id[None, :]
        weights = slow_weights(s, d, same, stats, margin, 0.5, 1e-4, 1e-3, 200)
        violation = np.where(same, 0, np.maximum(margin + s - d[:, None], 0))
        negative = slow_draw(uniform, weights, violation.argmax(axis=1))
        for i, j in enumerate(negative):
            if not same[i, j]:
                total += max(margin + s[i, j] - d[i], 0)
        chosen.append(negative)
    return total / len(image), chosen


jitted_loss = jax.jit(
    fne_jax.fne_triplet_loss_from_uniform, static_argnames=("margin", "key_chunk")
)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("positive_mean", [0.3, 0.7, 1.3])  # at 1.3 nothing can be sampled
def test_loss_agrees_with_the_slow_version(seed, positive_mean):
    batch = make_batch(seed)
    stats = SimilarityStatistics(gaussian(500, positive_mean, 0.01), gaussian(999, 0.2, 0.02))
    uniforms = np.random.default_rng(seed).random((2, 6)).astype(np.float32)
    loss, aux = jitted_loss(*uniforms, *batch, stats, margin=0.4)
    expected, chosen = slow_loss(uniforms, *batch, stats, 0.4)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(aux.negative_i2t, chosen[0])
    np.testing.assert_array_equal(aux.negative_t2i, chosen[1])
    assert (aux.fallback_fraction == 1) == (positive_mean == 1.3)


@pytest.mark.parametrize("key_chunk", [16, 48, 112, 4096])
@pytest.mark.parametrize("positive_mean", [0.4, 1.3])  # at 1.3 nothing can be sampled
def test_chunks_of_keys_change_nothing(key_chunk, positive_mean):
    *features, queue = make_batch(11, batch=19, dim=7, queue_size=16 * 7 + 5, images=30)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        queue = queue.enqueue(*matching_rows(rng, 19, 7), rng.integers(0, 30, 19))
    stats = SimilarityStatistics(gaussian(500, positive_mean, 0.02), gaussian(999, 0.2, 0.02))
    assert (queue.image_id >= 0).sum() > 100
    uniforms = np.random.default_rng(1).random((2, 19)).astype(np.float32)

    def loss_fn(image, text, key_chunk):
        return fne_jax.fne_triplet_loss_from_uniform(
            *uniforms, image, text, *features[2:], queue, stats, key_chunk=key_chunk
        )

    differentiate = jax.jit(jax.value_and_grad(loss_fn, (0, 1), has_aux=True), static_argnums=2)
    (whole, aux), grads = differentiate(*features[:2], None)
    (chunked, chunked_aux), chunked_grads = differentiate(*features[:2], key_chunk)
    for name in ("negative_i2t", "negative_t2i", "hardest_i2t", "hardest_t2i"):
        np.testing.assert_array_equal(getattr(chunked_aux, name), getattr(aux, name))
    assert max(aux.negative_i2t) > 19, "the case should reach into the memory"
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    for ours, theirs in zip(chunked_grads, grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    # Both agree with the plain loops.
    expected, chosen = slow_loss(uniforms, *features, queue, stats, 0.2)
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    np.testing.assert_array_equal(aux.negative_i2t, chosen[0])
    np.testing.assert_array_equal(aux.negative_t2i, chosen[1])


def test_chunks_of_keys_bound_the_memory():
    batch, queue_size, dim = 64, 131_072 - 64, 96
    shaped = jax.ShapeDtypeStruct
    emb, ids = shaped((batch, dim), jnp.float32), shaped((batch,), jnp.int32)
    queue = jax.eval_shape(lambda: MemoryQueue.create(jax.random.key(0), queue_size, dim))

    def scratch_mib(key_chunk):
        def loss_fn(image, text, momentum_image, momentum_text, image_id, queue):
            return fne_jax.fne_triplet_loss(
                jax.random.key(0), image, text, momentum_image, momentum_text, image_id, queue,
                TRUSTED, key_chunk=key_chunk,
            )[0]  # fmt: skip

        compiled = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))
        compiled = compiled.lower(emb, emb, emb, emb, ids, queue).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    matrix_mib = batch * (batch + queue_size) * 4 / 2**20
    assert matrix_mib == 32
    assert scratch_mib(4096) < matrix_mib / 2
    assert scratch_mib(None) > matrix_mib


def test_eight_devices_draw_what_one_draws():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    *features, queue = make_batch(3, batch=16, dim=9, queue_size=77, images=40)
    rng = np.random.default_rng(0)
    for _ in range(5):
        queue = queue.enqueue(*matching_rows(rng, 16, 9), rng.integers(0, 40, 16))

    def loss_fn(features, queue, key_chunk):
        return fne_jax.fne_triplet_loss(
            jax.random.key(7), *features, queue, TRUSTED, margin=0.4, key_chunk=key_chunk
        )

    jitted = jax.jit(loss_fn, static_argnums=2)
    for key_chunk in (None, 32):
        loss, aux = jitted(tuple(features), queue, key_chunk)
        sharded_loss, sharded_aux = jitted(
            tuple(jax.device_put(x, rows) for x in features),
            jax.device_put(queue, whole),
            key_chunk,
        )
        np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
        for name in ("negative_i2t", "negative_t2i"):
            np.testing.assert_array_equal(getattr(sharded_aux, name), getattr(aux, name))

    weights = np.random.default_rng(2).random((16, 1000)).astype("f")
    draw = jax.jit(fne_jax.sample_negatives)
    fallback = np.zeros(16, np.int32)
    np.testing.assert_array_equal(
        draw(jax.random.key(1), weights, fallback),
        draw(jax.random.key(1), jax.device_put(weights, rows), fallback),
    )


def test_gradient_is_that_of_the_chosen_triplets():
    *features, queue = make_batch(2)
    uniforms = np.random.default_rng(2).random((2, 6)).astype(np.float32)

    @jax.jit
    def loss_fn(image, text):
        return fne_jax.fne_triplet_loss_from_uniform(
            *uniforms, image, text, *features[2:], queue, TRUSTED, margin=0.4
        )[0]

    check_grads(loss_fn, tuple(features[:2]), order=1, modes=["rev"], atol=1e-2)
    momentum_grads = jax.grad(
        lambda keys: fne_jax.fne_triplet_loss_from_uniform(
            *uniforms, *features[:2], keys, keys, features[4], queue, TRUSTED
        )[0]
    )(features[2])
    assert (momentum_grads == 0).all()


def test_a_lone_pair_without_memory_has_no_loss():
    rng = np.random.default_rng(0)
    image, text = matching_rows(rng, 1, 5)
    loss, aux = jax.jit(fne_jax.fne_triplet_loss)(
        jax.random.key(0), image, text, image, text, np.array([3]), None, TRUSTED
    )
    assert loss == 0 and aux.fallback_fraction == 1


def test_backward_pass_has_no_product_over_the_keys():
    *features, queue = make_batch(0, queue_size=1009)

    def loss_fn(image, text):
        return fne_jax.fne_triplet_loss(
            jax.random.key(0), image, text, *features[2:], queue, TRUSTED
        )[0]

    def dots_over_keys(function):
        text = str(jax.make_jaxpr(function)(*features[:2]))
        return sum("dot_general" in line and "1009" in line for line in text.splitlines())

    assert dots_over_keys(loss_fn) == dots_over_keys(jax.grad(loss_fn, (0, 1))) == 2


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
    loss = fne_jax.hardest_negative_triplet_loss(image, text, same_image=same)
    np.testing.assert_allclose(loss, expected / 5, rtol=1e-5)
    unmasked = fne_jax.hardest_negative_triplet_loss(image, text)
    assert unmasked != loss


def test_infonce_is_cross_entropy_over_other_images():
    image, text, momentum_image, momentum_text, image_id, queue = make_batch(4)
    total = 0.0
    for anchor, keys, memory in (
        (image, momentum_text, queue.text),
        (text, momentum_image, queue.image),
    ):
        for i in range(6):
            logits = [anchor[i] @ keys[i]]
            logits += [anchor[i] @ keys[j] for j in range(6) if image_id[j] != image_id[i]]
            logits += [
                anchor[i] @ memory[j]
                for j in range(queue.size)
                if queue.image_id[j] not in (-1, image_id[i])
            ]
            logits = np.array(logits) / 0.3
            total += np.log(np.exp(logits).sum()) - logits[0]
    args = (image, text, momentum_image, momentum_text, image_id)
    loss, grads = jax.value_and_grad(
        lambda image: fne_jax.infonce_loss(image, *args[1:], queue, temperature=0.3)
    )(image)
    np.testing.assert_allclose(loss, total / 12, rtol=1e-5)
    assert np.isfinite(grads).all() and (grads != 0).any()
    empty = MemoryQueue.create(jax.random.key(0), 11, 9)
    in_batch = fne_jax.infonce_loss(*args, None, temperature=0.3)
    np.testing.assert_allclose(fne_jax.infonce_loss(*args, empty, temperature=0.3), in_batch)
    masked_grads = jax.grad(lambda x: fne_jax.infonce_loss(x, *args[1:], empty))(image)
    assert np.isfinite(masked_grads).all()


def test_clip_loss_is_cross_entropy_within_the_batch():
    rng = np.random.default_rng(1)
    image, text = matching_rows(rng, 5, 4, noise=1.0)
    ids = np.array([0, 1, 1, 2, 3])
    same = ids[:, None] == ids[None, :]
    s = np.asarray(image @ text.T, np.float64) / 0.3
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or not same[i, j]]
        total += np.log(np.exp(s[i, others]).sum()) - s[i, i]
        total += np.log(np.exp(s[others, i]).sum()) - s[i, i]
    loss, grads = jax.value_and_grad(
        lambda image, text: fne_jax.clip_loss(image, text, temperature=0.3, same_image=same),
        (0, 1),
    )(image, text)
    np.testing.assert_allclose(loss, total / 10, rtol=1e-5)
    assert all(np.isfinite(g).all() and (g != 0).any() for g in grads)
    assert fne_jax.clip_loss(image, text, temperature=0.3) > loss


def test_sigmoid_loss_judges_each_pair():
    rng = np.random.default_rng(1)
    image, text = matching_rows(rng, 5, 4, noise=1.0)
    ids = np.array([0, 1, 1, 2, 3])
    same = ids[:, None] == ids[None, :]
    logits = np.asarray(image @ text.T, np.float64) / 0.4 - 2.0
    total = 0.0
    for i, j in np.ndindex(5, 5):
        if i == j:
            total += np.log1p(np.exp(-logits[i, j]))
        elif not same[i, j]:
            total += np.log1p(np.exp(logits[i, j]))

    def loss_fn(image, text, temperature, bias):
        return fne_jax.sigmoid_loss(
            image, text, temperature=temperature, bias=bias, same_image=same
        )

    np.testing.assert_allclose(loss_fn(image, text, 0.4, -2.0), total / 5, rtol=1e-5)
    check_grads(loss_fn, (image, text, 0.4, -2.0), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def slow_rule(rule, similarity, positive, candidates):
    """Returns the choice of one anchor among candidate indices, None where any would do."""
    if rule is fne_jax.random_key:
        return None
    if rule is fne_jax.hardest_key:
        return max(candidates, key=lambda j: (similarity[j], -j))
    semi_hard = [j for j in candidates if similarity[j] < positive]
    if semi_hard:
        return max(semi_hard, key=lambda j: (similarity[j], -j))
    return min(candidates, key=lambda j: (similarity[j], j))


@pytest.mark.parametrize("rule", ["hardest_key", "semi_hard_key", "random_key"])
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_mined_negatives_agree_with_the_plain_loops(rule, memory, seed):
    rule = getattr(fne_jax, rule)
    *features, queue = make_batch(seed)
    image, text, momentum_image, momentum_text, image_id = features
    assert (queue.image_id == -1).any(), "the case should have empty slots"
    queue = queue if memory else None

    def loss_fn(image, text):
        return fne_jax.mined_triplet_loss(
            jax.random.key(seed), image, text, *features[2:], queue, TRUSTED, rule=rule, margin=0.4
        )

    (loss, aux), grads = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(image, text)
    expected, posteriors = 0.0, []
    for anchor, batch_keys, name, index in (
        (image, momentum_text, "text", aux.negative_i2t),
        (text, momentum_image, "image", aux.negative_t2i),
    ):
        keys, key_id = batch_keys, image_id
        if memory:
            keys = np.concatenate([batch_keys, getattr(queue, name)])
            key_id = np.concatenate([image_id, queue.image_id])
        similarity = np.asarray(anchor) @ np.asarray(keys).T
        for i in range(6):
            candidates = [
                j for j in range(len(keys)) if key_id[j] != image_id[i] and key_id[j] != -1
            ]
            assert index[i] in candidates
            choice = slow_rule(rule, similarity[i], similarity[i, i], candidates)
            assert choice is None or index[i] == choice
            expected += max(0.4 + similarity[i, index[i]] - similarity[i, i], 0)
            posteriors.append(fne_jax.false_negative_posterior(similarity[i, index[i]], TRUSTED))
    np.testing.assert_allclose(loss, expected / 6, rtol=1e-5)
    np.testing.assert_allclose(aux.posterior, np.mean(posteriors), rtol=1e-3)
    assert all((grad != 0).any() for grad in grads)
    check_grads(lambda *x: loss_fn(*x)[0], (image, text), order=1, modes=["rev"], atol=1e-2)


def test_random_negatives_are_uniform_over_other_images():
    *features, queue = make_batch(0)
    draw = jax.jit(
        lambda key: (
            fne_jax.mined_triplet_loss(key, *features, queue, TRUSTED, rule=fne_jax.random_key)[
                1
            ].negative_i2t
        )
    )
    drawn = np.stack([draw(key) for key in jax.random.split(jax.random.key(0), 3000)])
    key_id = np.concatenate([features[4], queue.image_id])
    candidates = np.flatnonzero((key_id != features[4][0]) & (key_id != -1))
    counts = np.bincount(drawn[:, 0], minlength=17)
    assert counts[candidates].sum() == 3000
    assert scipy_stats.chisquare(counts[candidates]).pvalue > 1e-3


def test_a_lone_pair_has_no_mined_negative():
    image, text = matching_rows(np.random.default_rng(0), 1, 5)
    for rule in (fne_jax.hardest_key, fne_jax.semi_hard_key, fne_jax.random_key):
        loss, aux = fne_jax.mined_triplet_loss(
            jax.random.key(0), image, text, image, text, np.array([3]), None, TRUSTED, rule=rule
        )
        assert loss == 0 and aux.fallback_fraction == 1


def test_queue_is_a_ring():
    rng = np.random.default_rng(0)
    queue = MemoryQueue.create(jax.random.key(0), 7, 3)
    np.testing.assert_allclose(np.linalg.norm(queue.image, axis=1), 1, rtol=1e-5)
    assert (queue.image_id == -1).all()
    expected = [-1] * 7
    slot = 0
    for step in range(5):
        image, text = matching_rows(rng, 3, 3)
        ids = np.arange(3) + 10 * step
        queue = queue.enqueue(image, text, ids, ids + 100)
        for row in range(3):
            expected[slot] = ids[row]
            np.testing.assert_array_equal(queue.text[slot], text[row])
            slot = (slot + 1) % 7
    assert queue.image_id.tolist() == expected
    assert queue.pair_id.tolist() == [i + 100 for i in expected]
    assert queue.pointer == slot


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": -0.1}, "margin: expected a number in"),
        ({"prior": 0.0}, r"prior: expected a number in \(0, 1\), got 0.0"),
        ({"prior": 1.0}, "prior: expected"),
        ({"decay": -1.0}, "decay: expected"),
        ({"key_chunk": 24}, "key_chunk: expected a multiple of 16 or None, got 24"),
        ({"posterior_threshold": 2.0}, "posterior_threshold: expected"),
        ({"text_emb": np.ones((5, 9), np.float32)}, r"text_emb: expected shape \(6, 9\)"),
        ({"image_id": np.ones(6, np.float32)}, "image_id: expected an integer dtype, got float32"),
        ({"image_emb": np.ones((6, 9), np.int32)}, "image_emb: expected a float dtype"),
        ({"queue": MemoryQueue.create(jax.random.key(0), 5, 8)}, "queue.image: expected shape"),
    ],
)
def test_wrong_arguments_are_named_while_tracing(change, message):
    names = (
        "image_emb",
        "text_emb",
        "momentum_image_emb",
        "momentum_text_emb",
        "image_id",
        "queue",
    )
    arguments = dict(zip(names, make_batch(0), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: fne_jax.fne_triplet_loss(jax.random.key(0), **arguments, stats=TRUSTED)
        )


def test_fewer_keys_than_anchors_are_refused():
    with pytest.raises(ValueError, match=r"at least as many keys as the 3 anchors.*, got 2"):
        fne_jax.sampling_weights(
            np.ones((3, 2), "f"), np.ones(3, "f"), np.zeros((3, 2), bool), TRUSTED
        )


def test_queue_refuses_what_does_not_fit():
    queue = MemoryQueue.create(jax.random.key(0), 4, 3)
    rows = np.ones((5, 3), np.float32)
    with pytest.raises(ValueError, match="at most 4 rows, got 5"):
        queue.enqueue(rows, rows, np.arange(5))
    with pytest.raises(ValueError, match="expected dim 3, got 2"):
        queue.enqueue(rows[:2, :2], rows[:2, :2], np.arange(2))


def test_half_precision_embeddings_are_compared_in_float32():
    image, text, *rest = make_batch(1)
    loss, _ = fne_jax.fne_triplet_loss(
        jax.random.key(0), jnp.bfloat16(image), jnp.bfloat16(text),
        *(jnp.bfloat16(x) for x in rest[:2]), *rest[2:], TRUSTED,
    )  # fmt: skip
    assert loss.dtype == jnp.float32

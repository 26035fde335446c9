"""Made-up features and statistics, and the method written as slow loops to compare with."""

import jax
import numpy as np

from fne_jax import MemoryQueue, SimilarityStatistics
from fne_jax.objectives.features import Features, Matches
from fne_jax.objectives.similarity_statistics import GaussianStatistics


def unit_rows(rng, rows, dim):
    vectors = rng.normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def matching_rows(rng, rows, dim, noise=0.5):
    """Returns [rows, dim] images and texts that are similar row by row."""
    image = unit_rows(rng, rows, dim)
    text = image + np.float32(noise) * unit_rows(rng, rows, dim)
    return image, text / np.linalg.norm(text, axis=1, keepdims=True)


def statistics(positive=(0.7, 0.01), negative=(0.4, 0.02), counts=(500, 1000)):
    """Returns statistics of two (mean, variance)."""
    return SimilarityStatistics(
        GaussianStatistics.from_moments(counts[0], *positive),
        GaussianStatistics.from_moments(counts[1], *negative),
    )


def make_batch(seed, batch=6, dim=9, queue_size=11, filled=7, images=4):
    """Returns Features, and a queue whose last slots are empty; captions share images."""
    rng = np.random.default_rng(seed)
    embeddings = (*matching_rows(rng, batch, dim), *matching_rows(rng, batch, dim))
    image_id = rng.integers(0, images, batch).astype(np.int32)
    slot_id = np.full(queue_size, -1, np.int32)
    slot_id[:filled] = rng.integers(0, images, filled)
    image, text = matching_rows(rng, queue_size, dim)
    queue = MemoryQueue(image, text, slot_id, slot_id, np.int32(filled % queue_size))
    return Features(*embeddings, image_id), queue


def arguments_of(features):
    """Returns the features as the public losses take them."""
    return (
        features.image,
        features.text,
        features.momentum_image,
        features.momentum_text,
        features.image_id,
    )


def make_matches(seed, batch=6, queue_size=11, density=0.3):
    """Returns known matches, different in both directions; own pairs are among them."""
    rng = np.random.default_rng(seed)
    masks = [rng.random((batch, keys)) < density for keys in (batch, queue_size, queue_size)]
    return Matches(masks[0] | np.eye(batch, dtype=bool), *masks[1:])


def known_of(features, queue):
    """Returns what is known of matches, [batch, keys] masks or 255ths of both directions."""
    matches = features.matches
    if matches is None:
        return [None, None]
    if queue is None:
        return [matches.batch, matches.batch.T]
    i2t = np.concatenate([matches.batch, matches.queue_text], axis=1)
    return [i2t, np.concatenate([matches.batch.T, matches.queue_image], axis=1)]


def excluded_of(features, queue):
    """Returns which keys are no negatives, [batch, keys] bool of both directions, as `keys_of`."""
    excluded = []
    for (_, _, key_id), known in zip(
        keys_of(features, queue), known_of(features, queue), strict=True
    ):
        same = features.image_id[:, None] == key_id[None, :]
        excluded.append(same if known is None or known.dtype != bool else same | known)
    return excluded


def keys_of(features, queue):
    """Returns (anchors, keys, image ids of the keys) of both directions, in NumPy."""
    batch = (features.image, features.momentum_text), (features.text, features.momentum_image)
    if queue is None:
        return [(anchor, keys, features.image_id) for anchor, keys in batch]
    key_id = np.concatenate([features.image_id, queue.image_id])
    slots = queue.text, queue.image
    return [
        (anchor, np.concatenate([keys, more]), key_id)
        for (anchor, keys), more in zip(batch, slots, strict=True)
    ]


def slow_posterior(similarity, stats, prior):
    """Bayes' rule over two Gaussians, in float64."""
    log_odds = np.log(prior / (1 - prior))
    for sign, gaussian in ((1, stats.positive), (-1, stats.negative)):
        mean, variance = float(gaussian.mean), float(gaussian.variance)
        density = -((similarity - mean) ** 2) / (2 * variance) - 0.5 * np.log(variance)
        log_odds = log_odds + sign * density
    return 1 / (1 + np.exp(-log_odds))


def slow_weights(
    s,
    d,
    same,
    stats,
    *,
    margin=0.2,
    tau=0.5,
    prior=1e-4,
    threshold=1e-3,
    min_count=200,
    posterior=None,
):
    """The sampling weights, candidate by candidate."""
    out = np.zeros_like(s)
    for i, j in np.ndindex(*s.shape):
        if same[i, j] or s[i, j] <= float(stats.positive.mean) - margin:
            continue
        if posterior is not None:
            p = posterior[i, j]
        elif float(stats.positive.count) > min_count:
            p = slow_posterior(float(s[i, j]), stats, prior)
        else:
            p = 0
        if p > threshold:
            out[i, j] = np.exp(-tau * p)
        else:
            out[i, j] = np.exp(-tau * (s[i, j] - d[i]) ** 2)
    return out


def slow_sample(uniform, weights, fallback):
    """The first key of each row whose cumulative weight exceeds its share of the total."""
    sampled = []
    for u, row, instead in zip(uniform, weights.astype(np.float64), fallback, strict=True):
        running = np.cumsum(row)
        hits = np.flatnonzero((row > 0) & (running > u * running[-1]))
        sampled.append(hits[0] if len(hits) else instead)
    return np.array(sampled)


def slow_loss(uniforms, features, queue, stats, margin, eliminated=1.0):
    """The loss of FNE and both directions' negatives, anchor by anchor.

    Keys with a posterior above `eliminated` are treated as if they were of the anchor's image.
    """
    total, chosen = 0.0, []
    directions = keys_of(features, queue), excluded_of(features, queue), known_of(features, queue)
    for (anchor, keys, _), same, known, uniform in zip(*directions, uniforms, strict=True):
        s = anchor @ keys.T
        d = (anchor * keys[: len(anchor)]).sum(axis=1)
        listed = None if known is None or known.dtype == bool else known / 255.0
        posterior = slow_posterior(s.astype(np.float64), stats, 1e-4) if listed is None else listed
        same = same | (posterior > eliminated)
        weights = slow_weights(s, d, same, stats, margin=margin, posterior=listed)
        violation = np.where(same, 0, np.maximum(margin + s - d[:, None], 0))
        negative = slow_sample(uniform, weights, violation.argmax(axis=1))
        for i, j in enumerate(negative):
            if not same[i, j]:
                total += max(margin + s[i, j] - d[i], 0)
        chosen.append(negative)
    return total / len(features.image), chosen


def assert_gradient(loss_and_gradient, arguments, step=1e-3, atol=2e-3):
    """Compares a gradient with the slopes of the loss along three random directions."""
    _, gradient = loss_and_gradient(*arguments)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        way = [rng.normal(size=np.shape(x)).astype(np.float32) for x in arguments]
        norm = np.sqrt(sum((w**2).sum() for w in way))
        way = [w / norm for w in way]
        ahead, behind = (
            loss_and_gradient(*(x + sign * step * w for x, w in zip(arguments, way, strict=True)))
            for sign in (1, -1)
        )
        slope = (float(ahead[0]) - float(behind[0])) / (2 * step)
        expected = sum((np.asarray(g) * w).sum() for g, w in zip(gradient, way, strict=True))
        np.testing.assert_allclose(slope, expected, atol=atol)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))

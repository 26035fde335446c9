"""Contrastive losses that FNE is compared with, or that warm it up."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fne_jax.objectives import checks, learned_scalars
from fne_jax.objectives.features import Features, check_features, directions
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.similarity_statistics import SimilarityStatistics, cosine

# Stands for the logarithm of 0: its exponential is 0, and unlike -inf it has a finite gradient
# where an anchor has no negative at all.
_LOG_ZERO = -1e30


def infonce_loss(
    features: Features,
    queue: MemoryQueue | None = None,
    stats: SimilarityStatistics | None = None,
    rng: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 0.07,
) -> tuple[jax.Array, None]:
    """Returns the contrastive loss over the batch's momentum keys and the queue.

    >>> import jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> features = Features(image_emb, text_emb, image_emb, text_emb, jnp.arange(2))
    >>> loss, _ = infonce_loss(features, temperature=0.1)
    >>> print(f"{loss:.3f}")  # log(1 + exp((0.6 - 0.8) / 0.1))
    0.127

    Args:
      features: The embeddings of the batch. Keys of the anchor's own image, other than its own
        match, and known matches take no part.
      queue: The queue of momentum embeddings, whose empty slots take no part either; or None for
        the batch's keys only.
      temperature: Divisor of the similarities, above 0; 0.07 in MoCo and ALBEF.

    Returns:
      The [] float32 cross entropy, the mean over the anchors of both directions, and None.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      He et al., MoCo, arXiv 1911.05722, equation 1; Li et al., ALBEF, arXiv 2107.07651,
      section 3.2.
    """
    del stats, rng
    temperature = _temperature(temperature, features)

    def losses(direction):
        in_batch, in_queue = direction.excluded()
        batch_keys = jax.lax.stop_gradient(direction.batch_keys)
        logits = cosine(direction.anchor, batch_keys) / temperature
        logits = jnp.where(in_batch & ~features.own, -jnp.inf, logits)
        positive = jnp.diagonal(logits)
        normaliser = jax.nn.logsumexp(logits, axis=1)
        if direction.queue_keys is not None:
            logits = cosine(direction.anchor, direction.queue_keys) / temperature
            logits = jnp.where(in_queue, -jnp.inf, logits)
            normaliser = jnp.logaddexp(normaliser, jax.nn.logsumexp(logits, axis=1))
        return normaliser - positive

    image_to_text, text_to_image = directions(features, queue)
    return (losses(image_to_text).mean() + losses(text_to_image).mean()) / 2, None


def clip_loss(
    features: Features,
    queue: MemoryQueue | None = None,
    stats: SimilarityStatistics | None = None,
    rng: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 0.05,
) -> tuple[jax.Array, None]:
    """Returns the contrastive loss within a batch, both sides of every pair with gradient.

    Towers that start from random weights learn several times faster with it than against
    momentum keys, which give each pair's gradient to one side at a time.

    >>> import jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> loss, _ = clip_loss(Features(image_emb, text_emb), temperature=0.1)
    >>> print(f"{loss:.3f}")  # log(1 + exp(-2))
    0.127

    Args:
      features: The embeddings of the batch. What it excludes takes no part.
      temperature: Divisor of the similarities, above 0.

    Returns:
      The [] float32 cross entropy, the mean over the anchors of both directions, and None.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      Radford et al., CLIP, ICML 2021, arXiv 2103.00020, figure 3.
    """
    del queue, stats, rng
    logits = _logits(features, temperature)
    logits = jnp.where(features.excluded & ~features.own, -jnp.inf, logits)
    positive = jnp.diagonal(logits)
    normaliser = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
    return (normaliser / 2 - positive).mean(), None


def multi_positive_loss(
    features: Features,
    queue: MemoryQueue | None = None,
    stats: SimilarityStatistics | None = None,
    rng: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 0.05,
    matches_are_positives: bool = False,
) -> tuple[jax.Array, None]:
    """Returns the decoupled contrastive loss of all matches within a batch.

    Each positive of an anchor is compared with the anchor's negatives alone, never with its other
    positives, so that none is pushed away for another's sake: the mean over the positives p, each
    by its weight, of log(1 + sum over the negatives n of exp((s_n - s_p) / temperature)). Both
    sides of every pair have gradient. With one positive for each anchor this is `clip_loss`:

    >>> import jax.numpy as jnp
    >>> from fne_jax.objectives.features import Matches
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> features = Features(image_emb, text_emb)
    >>> print(f"{multi_positive_loss(features, temperature=0.1)[0]:.3f}")
    0.127

    If the caption of pair 1 also matches the image of pair 0, that image and that caption have no
    negative left; the caption of pair 0 and the image of pair 1 have one each, as before.

    >>> features = features.replace(matches=Matches(jnp.array([[True, True], [False, True]])))
    >>> loss, _ = multi_positive_loss(features, temperature=0.1, matches_are_positives=True)
    >>> print(f"{loss:.3f}")
    0.063

    Args:
      features: The embeddings of the batch. An image and all its captions, by `image_id`, are
        positives; what else it excludes takes no part.
      temperature: Divisor of the similarities, above 0.
      matches_are_positives: Whether known matches are positives too, of their weight; else they
        take no part.

    Returns:
      The [] float32 loss, the mean over the anchors of both directions, and None.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, arXiv 2004.11362, equation 2,
      whose denominators hold the anchor's other positives too.
    """
    del queue, stats, rng
    logits = _logits(features, temperature)
    labelled = features.labelled.astype(jnp.float32)
    weight = features.positive_weight if matches_are_positives else labelled
    negatives = jnp.where((weight > 0) | features.excluded, _LOG_ZERO, logits)

    def direction(keys_axis):
        negative = jax.nn.logsumexp(negatives, axis=keys_axis, keepdims=True)
        losses = weight * jax.nn.softplus(negative - logits)
        return (losses.sum(axis=keys_axis) / weight.sum(axis=keys_axis)).mean()

    return (direction(1) + direction(0)) / 2, None


def sigmoid_loss(
    features: Features,
    queue: MemoryQueue | None = None,
    stats: SimilarityStatistics | None = None,
    rng: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 0.1,
    bias: float | jax.Array = -10.0,
    matches_are_positives: bool = False,
) -> tuple[jax.Array, None]:
    """Returns the pairwise sigmoid loss within a batch: each pair is judged by itself.

    SigLIP learns temperature and bias, starting from these defaults; give traced values to do so.

    >>> import jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> loss, _ = sigmoid_loss(Features(image_emb, text_emb), temperature=0.1, bias=-7.0)
    >>> print(f"{loss:.3f}")  # log(1 + exp(-1)) of its own match, and of the other
    0.627

    Args:
      features: The embeddings of the batch. What it excludes, and is no positive, takes no part.
      temperature: Divisor of the similarities, above 0.
      bias: Number added to the logits, about the log odds of a match at similarity 0.
      matches_are_positives: Whether known matches and all captions of an image, by `image_id`, are
        positives, the former of their weight; else an anchor has its own alone.

    Returns:
      The [] float32 loss, summed over all pairs and divided by the batch, and None.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023, arXiv 2303.15343,
      equation 1 and algorithm 1.
    """
    del queue, stats, rng
    logits = _logits(features, temperature) + learned_scalars.bias(bias, features.learned)
    own = features.own.astype(jnp.float32)
    positive = features.positive_weight if matches_are_positives else own
    negative = jnp.where(features.excluded, 0.0, 1.0)
    losses = jax.nn.softplus(jnp.where(positive > 0, -logits, logits))
    losses *= jnp.where(positive > 0, positive, negative)
    return losses.sum() / len(features.image), None


def _logits(features, temperature):
    """Returns the [batch, batch] similarities of images and captions over the temperature."""
    check_features(features)
    return cosine(features.image, features.text) / _temperature(temperature, features)


def _temperature(start, features):
    checks.in_range("temperature", start, 0, low_open=True)
    return learned_scalars.temperature(start, features.learned)

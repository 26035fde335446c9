"""Contrastive losses that FNE is compared with, or that warm it up."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.features import (
    Features,
    Matches,
    check_features,
    directions,
    excluded_keys,
)
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.similarity_statistics import cosine


def infonce_loss(
    image_emb: jax.Array,
    text_emb: jax.Array,
    momentum_image_emb: jax.Array,
    momentum_text_emb: jax.Array,
    image_id: jax.Array,
    queue: MemoryQueue | None,
    *,
    temperature: float | jax.Array = 0.07,
    matches: Matches | None = None,
) -> jax.Array:
    """Returns the contrastive loss over the batch's momentum keys and the queue.

    >>> import jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> loss = infonce_loss(
    ...     image_emb, text_emb, image_emb, text_emb, jnp.arange(2), None, temperature=0.1
    ... )
    >>> print(f"{loss:.3f}")  # log(1 + exp((0.6 - 0.8) / 0.1))
    0.127

    Args:
      image_emb: [batch, dim] L2-normalised online image embeddings.
      text_emb: [batch, dim] L2-normalised online text embeddings of the matching captions.
      momentum_image_emb: [batch, dim] the momentum encoder's embeddings of the same images.
      momentum_text_emb: [batch, dim] the momentum encoder's embeddings of the same captions.
      image_id: [batch] integer ids. Keys of the anchor's own image, other than its own match, and
        empty slots of the queue take no part.
      queue: The queue of momentum embeddings, or None for the batch's keys only.
      temperature: Divisor of the similarities, above 0; 0.07 in MoCo and ALBEF.
      matches: Known matches, which take no part either; or None.

    Returns:
      The [] float32 cross entropy, the mean over the anchors of both directions.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      He et al., MoCo, arXiv 1911.05722, equation 1; Li et al., ALBEF, arXiv 2107.07651,
      section 3.2.
    """
    momentum = jax.lax.stop_gradient((momentum_image_emb, momentum_text_emb))
    features = Features(image_emb, text_emb, *momentum, image_id, matches=matches)
    check_features(features, queue)
    checks.in_range("temperature", temperature, 0, low_open=True)
    own = jnp.eye(image_id.shape[0], dtype=bool)

    def losses(direction):
        in_batch, in_queue = excluded_keys(direction, image_id, queue)
        logits = cosine(direction.anchor, direction.batch_keys) / temperature
        logits = jnp.where(in_batch & ~own, -jnp.inf, logits)
        positive = jnp.diagonal(logits)
        normaliser = jax.nn.logsumexp(logits, axis=1)
        if in_queue is not None:
            logits = cosine(direction.anchor, direction.queue_keys) / temperature
            logits = jnp.where(in_queue, -jnp.inf, logits)
            normaliser = jnp.logaddexp(normaliser, jax.nn.logsumexp(logits, axis=1))
        return normaliser - positive

    image_to_text, text_to_image = directions(features, queue)
    return (losses(image_to_text).mean() + losses(text_to_image).mean()) / 2


def clip_loss(
    image_emb: jax.Array,
    text_emb: jax.Array,
    *,
    temperature: float | jax.Array = 0.05,
    same_image: jax.Array | None = None,
) -> jax.Array:
    """Returns the contrastive loss within a batch, both sides of every pair with gradient.

    Towers that start from random weights learn several times faster with it than against
    momentum keys, which give each pair's gradient to one side at a time.

    >>> import jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> print(f"{clip_loss(image_emb, text_emb, temperature=0.1):.3f}")  # log(1 + exp(-2))
    0.127

    Args:
      image_emb: [batch, dim] L2-normalised image embeddings.
      text_emb: [batch, dim] L2-normalised embeddings of the matching captions.
      temperature: Divisor of the similarities, above 0.
      same_image: [batch, batch] bool, true for images (rows) and captions that are no negatives of
        each other, such as those of one image; off the diagonal they take no part. None lets all
        take part.

    Returns:
      The [] float32 cross entropy, the mean over the anchors of both directions.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      Radford et al., CLIP, ICML 2021, arXiv 2103.00020, figure 3.
    """
    batch, _ = checks.embeddings(image_emb=image_emb, text_emb=text_emb)
    checks.in_range("temperature", temperature, 0, low_open=True)
    own = jnp.eye(batch, dtype=bool)
    same_image = own if same_image is None else same_image
    checks.shape("same_image", same_image, (batch, batch))
    logits = jnp.where(same_image & ~own, -jnp.inf, cosine(image_emb, text_emb) / temperature)
    positive = jnp.diagonal(logits)
    normaliser = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
    return (normaliser / 2 - positive).mean()


def sigmoid_loss(
    image_emb: jax.Array,
    text_emb: jax.Array,
    *,
    temperature: float | jax.Array = 0.1,
    bias: float | jax.Array = -10.0,
    same_image: jax.Array | None = None,
    positives: jax.Array | None = None,
) -> jax.Array:
    """Returns the pairwise sigmoid loss within a batch: each pair is judged by itself.

    SigLIP learns temperature and bias, starting from these defaults; give traced values to do so.

    >>> import jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> loss = sigmoid_loss(image_emb, text_emb, temperature=0.1, bias=-7.0)
    >>> print(f"{loss:.3f}")  # log(1 + exp(-1)) of its own match, and of the other
    0.627

    Args:
      image_emb: [batch, dim] L2-normalised image embeddings.
      text_emb: [batch, dim] L2-normalised embeddings of the matching captions.
      temperature: Divisor of the similarities, above 0.
      bias: Number added to the logits, about the log odds of a match at similarity 0.
      same_image: [batch, batch] bool, true for images (rows) and captions that are no negatives of
        each other, such as those of one image; unless they are positives, they take no part. None
        lets all take part.
      positives: [batch, batch] bool, true for images (rows) and captions that match; those of one
        pair do in any case. None knows of no others.

    Returns:
      The [] float32 loss, summed over all pairs and divided by the batch.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023, arXiv 2303.15343,
      equation 1 and algorithm 1.
    """
    batch, _ = checks.embeddings(image_emb=image_emb, text_emb=text_emb)
    checks.in_range("temperature", temperature, 0, low_open=True)
    own = jnp.eye(batch, dtype=bool)
    same_image = own if same_image is None else same_image
    checks.shape("same_image", same_image, (batch, batch))
    positives = own if positives is None else positives
    checks.shape("positives", positives, (batch, batch))
    positives = positives | own
    logits = cosine(image_emb, text_emb) / temperature + bias
    losses = jax.nn.softplus(jnp.where(positives, -logits, logits))
    return jnp.where(same_image & ~positives, 0.0, losses).sum() / batch

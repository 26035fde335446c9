"""The contrastive loss within a batch in which an anchor may have several positives."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.similarity_statistics import cosine

# Stands for the logarithm of 0: its exponential is 0, and unlike -inf it has a finite gradient
# where an anchor has no negative at all.
_LOG_ZERO = -1e30


def multi_positive_loss(
    image_emb: jax.Array,
    text_emb: jax.Array,
    *,
    temperature: float | jax.Array = 0.05,
    positives: jax.Array | None = None,
    excluded: jax.Array | None = None,
) -> jax.Array:
    """Returns the decoupled contrastive loss of all matches within a batch.

    Each positive of an anchor is compared with the anchor's negatives alone, never with its other
    positives, so that none is pushed away for another's sake: the mean over the positives p of
    log(1 + sum over the negatives n of exp((s_n - s_p) / temperature)). Both sides of every pair
    have gradient. With one positive for each anchor this is `clip_loss`:

    >>> import jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> print(f"{multi_positive_loss(image_emb, text_emb, temperature=0.1):.3f}")
    0.127

    If the caption of pair 1 also matches the image of pair 0, that image and that caption have no
    negative left; the caption of pair 0 and the image of pair 1 have one each, as before.

    >>> positives = jnp.array([[True, True], [False, True]])
    >>> loss = multi_positive_loss(image_emb, text_emb, temperature=0.1, positives=positives)
    >>> print(f"{loss:.3f}")
    0.063

    Args:
      image_emb: [batch, dim] L2-normalised image embeddings.
      text_emb: [batch, dim] L2-normalised embeddings of the matching captions.
      temperature: Divisor of the similarities, above 0.
      positives: [batch, batch] bool, true for images (rows) and captions that match, such as all
        captions of one image; those of one pair do in any case. None knows of no others.
      excluded: [batch, batch] bool, true for images (rows) and captions that are no negatives;
        unless they are positives, they take no part. None lets all take part.

    Returns:
      The [] float32 loss, the mean over the anchors of both directions.

    Raises:
      ValueError: on a wrong shape, dtype or range.

    References:
      Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, arXiv 2004.11362, equation 2,
      whose denominators hold the anchor's other positives too.
    """
    batch, _ = checks.embeddings(image_emb=image_emb, text_emb=text_emb)
    checks.in_range("temperature", temperature, 0, low_open=True)
    own = jnp.eye(batch, dtype=bool)
    positives = own if positives is None else positives
    checks.shape("positives", positives, (batch, batch))
    positives = positives | own
    excluded = own if excluded is None else excluded
    checks.shape("excluded", excluded, (batch, batch))
    logits = cosine(image_emb, text_emb) / temperature
    negatives = jnp.where(positives | excluded, _LOG_ZERO, logits)

    def direction(keys_axis):
        negative = jax.nn.logsumexp(negatives, axis=keys_axis, keepdims=True)
        losses = jnp.where(positives, jax.nn.softplus(negative - logits), 0.0)
        return (losses.sum(axis=keys_axis) / positives.sum(axis=keys_axis)).mean()

    return (direction(1) + direction(0)) / 2

"""Other rules for the negative, over the same keys as FNE's, to compare it with.

A rule is a pure function of one direction: it takes a PRNG key, the [batch, keys] float32
similarities, the [batch] similarity of each anchor to its own match, and [batch, keys] bool, true
where a key is a candidate (an existing key of another image that is not known to match); it returns
[batch] int32 choices and [batch] bool, whether the rule itself found one rather than fell back.
`mined_triplet_loss` trains with it. The rules are written plainly, over the full matrix: the fast
form is FNE's alone.

>>> import jax, jax.numpy as jnp
>>> similarity = jnp.array([[0.8, 0.6, 0.9], [0.3, 0.7, 0.65]])
>>> positive = jnp.array([0.8, 0.7])  # of key 0 to anchor 0, of key 1 to anchor 1
>>> candidate = jnp.array([[False, True, True], [True, False, True]])
>>> for rule in (hardest_negative, semi_hard_negative):
...     index, found = rule(jax.random.key(0), similarity, positive, candidate)
...     print(index.tolist(), found.tolist())
[2, 2] [True, True]
[1, 2] [True, True]
>>> index, found = random_negative(jax.random.key(0), similarity, positive, candidate)
>>> bool(candidate[jnp.arange(2), index].all())  # any of them
True
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.features import Features
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.negative_sampling import sample_negatives
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    cosine,
    false_negative_posterior,
)
from fne_jax.objectives.triplet_loss import Choice, TripletAux, triplet_loss_of_choices

Rule = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def hardest_negative(rng, similarity, positive, candidate) -> tuple[jax.Array, jax.Array]:
    """Chooses the most similar candidate.

    As VSE++ does within the batch (Faghri et al., arXiv 1707.05612, equation 6), over a queue.
    """
    del rng, positive
    checks.mask("candidate", candidate, similarity.shape)
    return _most_similar(similarity, candidate), candidate.any(axis=1)


def semi_hard_negative(rng, similarity, positive, candidate) -> tuple[jax.Array, jax.Array]:
    """Chooses the most similar candidate that is less similar than the positive.

    Where there is none, it chooses the least similar candidate. FaceNet (Schroff et al., arXiv
    1503.03832, section 3.2) leaves open which of the semi-hard is taken, and what where there is
    none; both are as its common implementations do.
    """
    del rng
    checks.mask("candidate", candidate, similarity.shape)
    semi_hard = candidate & (similarity < positive[:, None])
    found = semi_hard.any(axis=1)
    fallback = _most_similar(-similarity, candidate)
    return jnp.where(found, _most_similar(similarity, semi_hard), fallback), found


def random_negative(rng, similarity, positive, candidate) -> tuple[jax.Array, jax.Array]:
    """Chooses any candidate, all equally likely: the baseline of Wu et al., arXiv 1706.07567."""
    del positive
    checks.mask("candidate", candidate, similarity.shape)
    fallback = jnp.zeros(similarity.shape[0], jnp.int32)
    return sample_negatives(rng, candidate.astype(jnp.float32), fallback), candidate.any(axis=1)


def mined_triplet_loss(
    features: Features,
    queue: MemoryQueue | None,
    stats: SimilarityStatistics,
    rng: jax.Array,
    *,
    rule: Rule,
    margin: float = 0.2,
    prior: float = 1e-4,
) -> tuple[jax.Array, TripletAux]:
    """Returns the triplet loss over momentum keys with the negatives that a rule chooses.

    >>> import jax, jax.numpy as jnp
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # similarities 0.8 own, 0.6 other
    >>> features = Features(image_emb, text_emb, image_emb, text_emb, jnp.arange(2))
    >>> stats, rng = SimilarityStatistics.create(), jax.random.key(0)
    >>> loss, aux = mined_triplet_loss(
    ...     features, None, stats, rng, rule=hardest_negative, margin=0.3
    ... )
    >>> print(f"{loss:.3f}", aux.negative_i2t.tolist())
    0.200 [1, 0]

    Args:
      features: The embeddings of the batch.
      queue: The queue of momentum embeddings, whose empty slots are no candidates; or None for
        the batch's keys only.
      stats: The similarity statistics, for the posterior in the TripletAux alone.
      rng: PRNG key from which the rule may sample.
      rule: `hardest_negative`, `semi_hard_negative`, `random_negative`, or another of their kind.
      margin: Similarity by which the positive should win, at least 0.
      prior: Share of false negatives, for the posterior in the TripletAux alone.

    Returns:
      The [] float32 loss, summed over both directions and divided by the batch, and a TripletAux.

    Raises:
      ValueError: on a wrong shape, dtype or range.
    """
    checks.in_range("margin", margin, 0)

    def choose(rng, direction):
        similarity = cosine(direction.anchor, direction.batch_keys)
        positive = jnp.diagonal(similarity)
        in_batch, in_queue = direction.excluded()
        candidate = ~in_batch
        if in_queue is not None:
            in_queue_similarity = cosine(direction.anchor, direction.queue_keys)
            similarity = jnp.concatenate([similarity, in_queue_similarity], axis=1)
            candidate = jnp.concatenate([candidate, ~in_queue], axis=1)
        similarity, positive = jax.lax.stop_gradient((similarity, positive))
        index, found = rule(rng, similarity, positive, candidate)
        counts = candidate.any(axis=1)
        hardest = jnp.where(counts, _most_similar(similarity, candidate), -1)
        return Choice(index, hardest, found, counts)

    posterior = functools.partial(false_negative_posterior, stats=stats, prior=prior)
    return triplet_loss_of_choices(
        choose, jax.random.split(rng), features, queue, posterior, margin=margin
    )


def _most_similar(similarity, candidate):
    return jnp.argmax(jnp.where(candidate, similarity, -jnp.inf), axis=1).astype(jnp.int32)

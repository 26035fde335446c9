"""Other rules for the negative, over the same keys as FNE's, to compare it with.

A rule is a pure function of one direction: it takes a PRNG key, the [batch, keys] float32
similarities, the [batch] similarity of each anchor to its own match, and [batch, keys] bool, which
keys are candidates (existing keys of another image); it returns [batch] int32 choices and [batch]
bool, whether the rule itself found one rather than fell back. `mined_triplet_loss` trains with it.
The rules are written plainly, over the whole matrix: the fast form is FNE's alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.memory_queue import EMPTY_ID, MemoryQueue
from fne_jax.objectives.negative_sampling import sample_negatives
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    cosine,
    false_negative_posterior,
)
from fne_jax.objectives.triplet_loss import (
    Choice,
    TripletAux,
    check_features,
    triplet_loss_of_choices,
)

Rule = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def hardest_key(rng, similarity, positive, candidate) -> tuple[jax.Array, jax.Array]:
    """Chooses the most similar candidate: VSE++ (arXiv 1707.05612, equation 6), over a memory."""
    del rng, positive
    return _most_similar(similarity, candidate), candidate.any(axis=1)


def semi_hard_key(rng, similarity, positive, candidate) -> tuple[jax.Array, jax.Array]:
    """Chooses the most similar candidate that is less similar than the positive.

    Where there is none, the least similar candidate. FaceNet (arXiv 1503.03832, section 3.2);
    which one of the semi-hard, and the fallback, as its common implementations do.
    """
    del rng
    semi_hard = candidate & (similarity < positive[:, None])
    found = semi_hard.any(axis=1)
    fallback = _most_similar(-similarity, candidate)
    return jnp.where(found, _most_similar(similarity, semi_hard), fallback), found


def random_key(rng, similarity, positive, candidate) -> tuple[jax.Array, jax.Array]:
    """Chooses any candidate, all equally likely: the baseline of Wu et al., arXiv 1706.07567."""
    del positive
    fallback = jnp.zeros(similarity.shape[0], jnp.int32)
    return sample_negatives(rng, candidate.astype(jnp.float32), fallback), candidate.any(axis=1)


def mined_triplet_loss(
    rng: jax.Array,
    image_emb: jax.Array,
    text_emb: jax.Array,
    momentum_image_emb: jax.Array,
    momentum_text_emb: jax.Array,
    image_id: jax.Array,
    queue: MemoryQueue | None,
    stats: SimilarityStatistics,
    *,
    rule: Rule,
    margin: float = 0.2,
    prior: float = 1e-4,
) -> tuple[jax.Array, TripletAux]:
    """Returns the triplet loss over momentum keys with the negatives that a rule chooses.

    Args:
      rng: see `fne_triplet_loss`, as all up to `queue`.
      image_emb: see `fne_triplet_loss`.
      text_emb: see `fne_triplet_loss`.
      momentum_image_emb: see `fne_triplet_loss`.
      momentum_text_emb: see `fne_triplet_loss`.
      image_id: see `fne_triplet_loss`.
      queue: see `fne_triplet_loss`; its empty slots are no candidates.
      stats: for the posterior in the TripletAux alone.
      rule: `hardest_key`, `semi_hard_key`, `random_key`, or another of their kind.
      margin: similarity by which the positive should win.
      prior: for the posterior in the TripletAux alone.

    Returns:
      The [] float32 loss, summed over both directions and divided by the batch, and a TripletAux.

    Raises:
      ValueError: on a wrong shape, dtype or range.
    """
    check_features(image_emb, text_emb, momentum_image_emb, momentum_text_emb, image_id, queue)
    checks.in_range("margin", margin, 0)
    candidate = image_id[:, None] != image_id[None, :]
    if queue is not None:
        in_queue = image_id[:, None] != queue.image_id[None, :]
        in_queue &= (queue.image_id != EMPTY_ID)[None, :]
        candidate = jnp.concatenate([candidate, in_queue], axis=1)

    def choose(rng, anchor, batch_keys, queue_keys):
        similarity = cosine(anchor, batch_keys)
        positive = jnp.diagonal(similarity)
        if queue_keys is not None:
            similarity = jnp.concatenate([similarity, cosine(anchor, queue_keys)], axis=1)
        similarity, positive = jax.lax.stop_gradient((similarity, positive))
        index, found = rule(rng, similarity, positive, candidate)
        hardest = _most_similar(similarity, candidate)
        return Choice(index, hardest, found, candidate.any(axis=1))

    i2t_rng, t2i_rng = jax.random.split(rng)
    queue_text = None if queue is None else queue.text
    queue_image = None if queue is None else queue.image
    return triplet_loss_of_choices(
        choose(i2t_rng, image_emb, momentum_text_emb, queue_text),
        choose(t2i_rng, text_emb, momentum_image_emb, queue_image),
        image_emb,
        text_emb,
        momentum_image_emb,
        momentum_text_emb,
        queue,
        functools.partial(false_negative_posterior, stats=stats, prior=prior),
        margin=margin,
    )


def _most_similar(similarity, candidate):
    return jnp.argmax(jnp.where(candidate, similarity, -jnp.inf), axis=1).astype(jnp.int32)

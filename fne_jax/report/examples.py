"""Which queries and negatives of an evaluated split are worth looking at."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.evaluation.blocks import by_blocks
from fne_jax.objectives.fne_settings import FNESettings
from fne_jax.objectives.negative_mining import hardest_negative
from fne_jax.objectives.negative_sampling import candidate_weight, sample_negatives
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    cosine,
    false_negative_posterior,
)
from fne_jax.objectives.triplet_loss import rowwise_cosine


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The negatives that a rule chooses.

    Attributes:
      index: [anchors] gallery row of each negative.
      similarity: [anchors] similarity of each anchor to its negative.
      posterior: [anchors] probability that the negative is a false one, taken monotone.
    """

    index: np.ndarray
    similarity: np.ndarray
    posterior: np.ndarray


@dataclasses.dataclass(frozen=True)
class NegativeChoices:
    """The negatives that two rules choose for the same anchors, in one direction.

    Attributes:
      positive_similarity: [anchors] similarity of each anchor to its own match.
      hardest: The negatives of hardest-negative mining.
      chosen: The negatives that FNE samples, or its fallback.
      sampled: [anchors] bool, false where every candidate weighs 0 and FNE falls back.
    """

    positive_similarity: np.ndarray
    hardest: Chosen
    chosen: Chosen
    sampled: np.ndarray


def choose_negatives(
    rng: jax.Array,
    anchor_emb: np.ndarray,
    positive_emb: np.ndarray,
    gallery_emb: np.ndarray,
    same_image: np.ndarray,
    stats: SimilarityStatistics,
    settings: FNESettings,
) -> NegativeChoices:
    """Returns the negatives of hardest-negative mining and of FNE for some anchors.

    Args:
      rng: A typed PRNG key.
      anchor_emb: [anchors, dim] L2-normalised.
      positive_emb: [anchors, dim] the match of each anchor, L2-normalised.
      gallery_emb: [keys, dim] the candidates, L2-normalised, at least as many as anchors.
      same_image: [anchors, keys] bool, true where a candidate shows the anchor's image. Every
        anchor needs a candidate that does not.
      stats: The similarity statistics.
      settings: The constants of FNE.
    """
    similarity = cosine(jnp.asarray(anchor_emb), jnp.asarray(gallery_emb))
    positive = rowwise_cosine(jnp.asarray(anchor_emb), jnp.asarray(positive_emb))
    same_image = jnp.asarray(same_image)
    hardest, _ = hardest_negative(rng, similarity, positive, ~same_image)
    weights = candidate_weight(similarity, positive[:, None], same_image, stats, settings)
    chosen = sample_negatives(rng, weights, hardest)

    def of(index):
        picked = jnp.take_along_axis(similarity, index[:, None], axis=1)[:, 0]
        # Monotone, whatever the run trained with, as in an audit: by the authors' formula a pair
        # far to the left, which no step would sample, is the most suspect of all.
        posterior = false_negative_posterior(picked, stats, settings.prior, monotone=True)
        return Chosen(np.asarray(index), np.asarray(picked), np.asarray(posterior))

    sampled = np.asarray(weights.sum(axis=1) > 0)
    return NegativeChoices(np.asarray(positive), of(hardest), of(chosen), sampled)


@dataclasses.dataclass(frozen=True)
class QueryOutcomes:
    """How each query of one direction fared.

    Attributes:
      match: [queries] gallery row of its most similar match.
      match_similarity: [queries] similarity of the two.
      rival: [queries] gallery row of the most similar item that is not labelled a match.
      rival_similarity: [queries] similarity of the two.
      rank: [queries] place of the match, from 1; an equally similar rival counts before it.
    """

    match: np.ndarray
    match_similarity: np.ndarray
    rival: np.ndarray
    rival_similarity: np.ndarray
    rank: np.ndarray

    def best_and_worst(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the queries whose match leads by most, and those whose match trails by most."""
        order = np.argsort(self.rival_similarity - self.match_similarity, kind="stable")
        return order[:count], order[::-1][:count]


def query_outcomes(
    query_emb: np.ndarray,
    gallery_emb: np.ndarray,
    query_label: np.ndarray,
    gallery_label: np.ndarray,
) -> QueryOutcomes:
    """Returns the outcome of each query.

    Args:
      query_emb: [queries, dim] L2-normalised.
      gallery_emb: [items, dim] L2-normalised.
      query_label: [queries] int; items with the same label match.
      gallery_label: [items] int, of at least two labels, all of the queries' among them.
    """
    gallery = jax.device_put((gallery_emb, gallery_label))
    outcomes = by_blocks(
        len(query_emb), lambda part: _outcomes(query_emb[part], query_label[part], *gallery)
    )
    return QueryOutcomes(*outcomes)


@jax.jit
def _outcomes(queries, query_label, gallery, gallery_label):
    similarity = cosine(queries, gallery)
    own = query_label[:, None] == gallery_label[None, :]
    match = jnp.where(own, similarity, -jnp.inf)
    rival = jnp.where(own, -jnp.inf, similarity)
    best = match.max(axis=1)
    rank = 1 + (rival >= best[:, None]).sum(axis=1)
    return match.argmax(axis=1), best, rival.argmax(axis=1), rival.max(axis=1), rank

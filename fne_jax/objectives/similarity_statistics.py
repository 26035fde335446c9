"""Running statistics of matching and hardest other similarities, and the posterior from them.

FNE models the similarity of true matches and of hardest negatives as two Gaussians, estimated
while training goes on, and asks Bayes' rule how likely a candidate negative is a match that the
dataset forgot to label (Li et al. 2023, arXiv 2308.04380, section 3.2).
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from fne_jax.objectives import checks

# Below it a Gaussian is as good as a point, and its square would overflow the log-odds.
MIN_VARIANCE = 1e-8


@flax.struct.dataclass
class GaussianStatistics:
    """Count, sum and squared deviations of a stream of similarities.

    Attributes:
      count: [] float32, values seen (fractional where the stream is decayed).
      total: [] float32, their sum.
      deviation: [] float32, sum of squared deviations, each batch's from the mean that includes it.
    """

    count: jax.Array
    total: jax.Array
    deviation: jax.Array

    @classmethod
    def create(cls) -> GaussianStatistics:
        """Returns the statistics of nothing."""
        # Three arrays rather than one thrice: a donated train state must not hold a buffer twice.
        return cls(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

    @property
    def mean(self) -> jax.Array:
        """[] mean similarity; 0 while nothing was seen."""
        return jnp.where(self.count > 0, self.total / jnp.maximum(self.count, 1e-6), 0.0)

    @property
    def variance(self) -> jax.Array:
        """[] unbiased variance; 0 while fewer than two values were seen."""
        return jnp.where(self.count > 1, self.deviation / jnp.maximum(self.count - 1, 1e-6), 0.0)

    def update(self, values: jax.Array, mask: jax.Array, keep: float = 1.0) -> GaussianStatistics:
        """Adds the values where `mask` holds.

        Args:
          values: float32, any shape.
          mask: bool, shaped as `values`.
          keep: share of the old count, sum and deviation that is kept, in (0, 1].
        """
        values = jnp.where(mask, values, 0.0)
        count = keep * self.count + mask.sum()
        total = keep * self.total + values.sum()
        mean = total / jnp.maximum(count, 1e-6)
        deviation = keep * self.deviation + jnp.where(mask, jnp.square(values - mean), 0.0).sum()
        return GaussianStatistics(count, total, deviation)


@flax.struct.dataclass
class SimilarityStatistics:
    """The two distributions that the posterior compares.

    Attributes:
      positive: similarities of pairs that are each other's top match in their batch.
      negative: for the same pairs, similarities of the hardest negative of either direction.
    """

    positive: GaussianStatistics
    negative: GaussianStatistics

    @classmethod
    def create(cls) -> SimilarityStatistics:
        """Returns the statistics of nothing, as at the start of an epoch."""
        return cls(GaussianStatistics.create(), GaussianStatistics.create())


def update_similarity_statistics(
    stats: SimilarityStatistics,
    image_emb: jax.Array,
    text_emb: jax.Array,
    same_image: jax.Array | None = None,
    *,
    keep: float = 1.0,
) -> SimilarityStatistics:
    """Adds one batch to the similarity statistics (design of the paper's section 3.2).

    Pairs that are each other's top match give their own similarity to the positive distribution
    and the hardest negative of their row and of their column to the negative one.

    Args:
      stats: the statistics so far.
      image_emb: [batch, dim] L2-normalised online image embeddings.
      text_emb: [batch, dim] L2-normalised online text embeddings of the matching captions.
      same_image: [batch, batch] bool, true where two pairs show one image. Such off-diagonal
        entries are no competitors for the top match and count as similarity 0 among the
        negatives. None leaves only the diagonal out, as the authors do.
      keep: share of the old statistics kept at each update. 1 accumulates until a reset (the
        paper: at each epoch); below 1 it forgets exponentially, for streams without epochs, with
        an effective memory of 1 / (1 - keep) batches.

    Returns:
      The updated statistics. No gradient flows through them.

    Raises:
      ValueError: on a wrong shape or dtype, or `keep` outside (0, 1].
    """
    checks.embeddings(image_emb=image_emb, text_emb=text_emb)
    checks.in_range("keep", keep, 0, 1, low_open=True)
    batch = image_emb.shape[0]
    own = jnp.eye(batch, dtype=bool)
    if same_image is None:
        same_image = own
    checks.shape("same_image", same_image, (batch, batch))

    similarity = jax.lax.stop_gradient(cosine(image_emb, text_emb))
    competitors = jnp.where(same_image & ~own, -jnp.inf, similarity)
    index = jnp.arange(batch)
    mutual = (competitors.argmax(axis=1) == index) & (competitors.argmax(axis=0) == index)
    negatives = jnp.where(same_image | own, 0.0, similarity)
    hardest = jnp.stack([negatives.max(axis=1), negatives.max(axis=0)])
    return SimilarityStatistics(
        positive=stats.positive.update(jnp.diagonal(similarity), mutual, keep),
        negative=stats.negative.update(hardest, jnp.stack([mutual, mutual]), keep),
    )


def false_negative_posterior(
    similarity: jax.Array,
    stats: SimilarityStatistics,
    prior: float = 1e-4,
    *,
    monotone: bool = False,
) -> jax.Array:
    """Returns the probability that a candidate of this similarity is a match (section 3.2).

    Bayes' rule over the two Gaussians, as the sigmoid of a log-odds so that it is finite for any
    similarity. The log-odds is a parabola in the similarity: where the variances differ it turns
    round at its vertex, and beyond it the authors' formula calls a lower similarity likelier to
    be a match (or a higher one less likely).

    Args:
      similarity: cosine similarities, any shape.
      stats: the similarity statistics.
      prior: share of candidates that are unlabelled matches, in (0, 1); 1e-4 in the paper.
      monotone: hold the posterior at the vertex's value on the falling side of the parabola, so
        that it never falls as similarity rises. False keeps the authors' formula.

    Returns:
      The posterior in [0, 1], shaped as `similarity`, without gradient; the prior itself while
      either distribution has seen fewer than two values.

    Raises:
      ValueError: if the prior is outside (0, 1).
    """
    checks.in_range("prior", prior, 0, 1, low_open=True, high_open=True)
    similarity = jax.lax.stop_gradient(jnp.asarray(similarity, jnp.float32))
    if monotone:
        similarity = _onto_rising_branch(similarity, stats)
    log_odds = (
        jnp.log(prior)
        - jnp.log1p(-prior)
        + _log_density(similarity, stats.positive)
        - _log_density(similarity, stats.negative)
    )
    trusted = (stats.positive.count >= 2) & (stats.negative.count >= 2)
    return jnp.where(trusted, jax.nn.sigmoid(log_odds), jnp.float32(prior))


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the [n, m] float32 products of the rows of [n, dim] and [m, dim].

    In full precision on every backend: TPUs and recent GPUs would otherwise round the inputs to
    bfloat16 or TF32, an error of the size of the margins between hard negatives.
    """
    return jnp.matmul(
        a.astype(jnp.float32), b.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST
    )


def _log_density(similarity, gaussian):
    """Gaussian log density without the constant that both distributions share."""
    variance = jnp.maximum(gaussian.variance, MIN_VARIANCE)
    return -0.5 * (jnp.square(similarity - gaussian.mean) / variance + jnp.log(variance))


def _onto_rising_branch(similarity, stats):
    """Moves similarities on the falling side of the log-odds parabola to its vertex."""
    positive, negative = stats.positive, stats.negative
    precision_p = 1 / jnp.maximum(positive.variance, MIN_VARIANCE)
    precision_n = 1 / jnp.maximum(negative.variance, MIN_VARIANCE)
    curvature = 0.5 * (precision_n - precision_p)
    slope = positive.mean * precision_p - negative.mean * precision_n
    vertex = -slope / (2 * jnp.where(curvature == 0, 1.0, curvature))
    # Cosines end at -1 and 1, so a vertex beyond them means that one branch covers everything.
    vertex = jnp.clip(vertex, -1.0, 1.0)
    straight = jnp.where(slope >= 0, similarity, 1.0)
    bent = jnp.where(
        curvature < 0, jnp.minimum(similarity, vertex), jnp.maximum(similarity, vertex)
    )
    return jnp.where(curvature == 0, straight, bent)

"""Running statistics of matching and hardest other similarities, and the posterior from them.

FNE models the similarities of true matches and of hardest negatives as two Gaussians, estimated
while training goes on, and asks Bayes' rule how likely a candidate negative is a match that the
dataset forgot to label (Li et al. 2023, arXiv 2308.04380, section 3.2).

In a batch of three pairs with these similarities of images (rows) to texts (columns)

            text 0   text 1   text 2
  image 0    0.9      0.1      0.3
  image 1    0.2      0.5      0.6
  image 2    0.0      0.4      0.7

pairs 0 and 2 are each other's top match and pair 1 is not: image 1 prefers text 2. So 0.9 and 0.7
enter the positive distribution. Into the negative one go the hardest negatives of the same two
pairs, of their row and of their column: 0.3 and 0.2 for pair 0, 0.4 and 0.6 for pair 2.

>>> import jax.numpy as jnp
>>> similarity = jnp.array([[0.9, 0.1, 0.3], [0.2, 0.5, 0.6], [0.0, 0.4, 0.7]])
>>> stats = SimilarityStatistics.create()
>>> # Texts on the axes make the products of the rows the similarities above.
>>> stats = update_similarity_statistics(stats, similarity, jnp.eye(3))
>>> for gaussian in (stats.positive, stats.negative):
...     print(f"{gaussian.count:.0f} values, mean {gaussian.mean:.3f}")
2 values, mean 0.800
4 values, mean 0.375
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.features import Features

# A narrower Gaussian is as good as a point, and its exponent would overflow the log-odds.
MIN_VARIANCE = 1e-8


@flax.struct.dataclass
class GaussianStatistics:
    """Count, sum and squared deviations of a stream of similarities.

    Attributes:
      count: [] float32 number of values seen (fractional where old values are forgotten).
      total: [] float32 sum of the values.
      deviation: [] float32 sum of squared deviations, each batch's from the mean that includes it.
    """

    count: jax.Array
    total: jax.Array
    deviation: jax.Array

    @classmethod
    def create(cls) -> GaussianStatistics:
        """Returns statistics that have seen no value yet."""
        # Three arrays rather than one thrice: a donated train state must not hold a buffer twice.
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))

    @classmethod
    def from_moments(cls, count: float, mean: float, variance: float) -> GaussianStatistics:
        """Returns statistics of so many values with this mean and (unbiased) variance."""
        return cls(
            jnp.float32(count), jnp.float32(count * mean), jnp.float32((count - 1) * variance)
        )

    @property
    def mean(self) -> jax.Array:
        """[] mean similarity; 0 while no value has been seen."""
        return jnp.where(self.count > 0, self.total / jnp.maximum(self.count, 1e-6), 0.0)

    @property
    def variance(self) -> jax.Array:
        """[] unbiased variance; 0 while fewer than two values have been seen."""
        return jnp.where(self.count > 1, self.deviation / jnp.maximum(self.count - 1, 1e-6), 0.0)

    def update(
        self, values: jax.Array, mask: jax.Array, ema_decay: float = 1.0
    ) -> GaussianStatistics:
        """Returns the statistics with the values added for which `mask`, of their shape, holds.

        `ema_decay` is the share of the old count, sum and deviation that is kept, in (0, 1].
        """
        checks.mask("mask", mask, jnp.shape(values))
        values = jnp.where(mask, values, 0.0)
        count = ema_decay * self.count + mask.sum(dtype=jnp.float32)
        total = ema_decay * self.total + values.sum()
        mean = total / jnp.maximum(count, 1e-6)
        added = jnp.where(mask, jnp.square(values - mean), 0.0).sum()
        return GaussianStatistics(count, total, ema_decay * self.deviation + added)


@flax.struct.dataclass
class SimilarityStatistics:
    """The two distributions that the posterior compares.

    Attributes:
      positive: Similarities of pairs that are each other's top match in their batch.
      negative: For the same pairs, similarities of the hardest negative of either direction.
    """

    positive: GaussianStatistics
    negative: GaussianStatistics

    @classmethod
    def create(cls) -> SimilarityStatistics:
        """Returns statistics that have seen no batch yet, as at the start of an epoch."""
        return cls(GaussianStatistics.create(), GaussianStatistics.create())


def update_similarity_statistics(
    stats: SimilarityStatistics,
    image_emb: jax.Array,
    text_emb: jax.Array,
    same_image: jax.Array | None = None,
    *,
    ema_decay: float = 1.0,
) -> SimilarityStatistics:
    """Returns the similarity statistics with one batch added.

    Pairs that are each other's top match give their own similarity to the positive distribution,
    and the hardest negatives of their row and of their column to the negative one. The head of
    this module works an example.

    Args:
      stats: The statistics so far.
      image_emb: [batch, dim] L2-normalised online image embeddings.
      text_emb: [batch, dim] L2-normalised online text embeddings of the matching captions.
      same_image: [batch, batch] bool, true for images (rows) and captions that are no negatives of
        each other, such as those of one image. Such off-diagonal entries are no competitors for
        the top match and count as similarity 0 among the negatives. None leaves only the diagonal
        out, as the authors do.
      ema_decay: Share of the old statistics that is kept at each update, in (0, 1]. 1 accumulates
        until a reset (the paper resets at each epoch); below 1 the statistics are an exponential
        moving average over some 1 / (1 - ema_decay) batches, for data without epochs.

    Returns:
      The updated statistics. No gradient flows through them.

    Raises:
      ValueError: on a wrong shape or dtype, or an `ema_decay` outside (0, 1].

    References:
      Li et al., Your Negative May not Be True Negative, ACM MM 2023, arXiv 2308.04380, section 3.2.
    """
    checks.embeddings(image_emb=image_emb, text_emb=text_emb)
    checks.in_range("ema_decay", ema_decay, 0, 1, low_open=True)
    batch = image_emb.shape[0]
    own = jnp.eye(batch, dtype=bool)
    if same_image is None:
        same_image = own
    checks.mask("same_image", same_image, (batch, batch))

    similarity = jax.lax.stop_gradient(cosine(image_emb, text_emb))
    competitors = jnp.where(same_image & ~own, -jnp.inf, similarity)
    index = jnp.arange(batch)
    mutual = (competitors.argmax(axis=1) == index) & (competitors.argmax(axis=0) == index)
    negatives = jnp.where(same_image | own, 0.0, similarity)
    hardest = jnp.stack([negatives.max(axis=1), negatives.max(axis=0)])
    return SimilarityStatistics(
        positive=stats.positive.update(jnp.diagonal(similarity), mutual, ema_decay),
        negative=stats.negative.update(hardest, jnp.stack([mutual, mutual]), ema_decay),
    )


@dataclasses.dataclass(frozen=True)
class StatisticsRule:
    """How the batches of a run enter the similarity statistics.

    Attributes:
      ema_decay: The share of the old statistics that is kept at each step, in (0, 1].
      steps_per_epoch: The steps after which statistics with an `ema_decay` of 1 start again; None
        for never.
    """

    ema_decay: float
    steps_per_epoch: int | None

    def before_step(self, stats: SimilarityStatistics, step: jax.Array) -> SimilarityStatistics:
        """Returns the statistics that step `step` adds to: empty ones where an epoch begins."""
        if self.ema_decay < 1 or self.steps_per_epoch is None:
            return stats
        starts_epoch = step % self.steps_per_epoch == 0
        return jax.tree.map(lambda value: jnp.where(starts_epoch, 0.0, value), stats)

    def add(self, stats: SimilarityStatistics, features: Features) -> SimilarityStatistics:
        """Returns the statistics with a batch added."""
        return update_similarity_statistics(
            stats, features.image, features.text, features.excluded, ema_decay=self.ema_decay
        )


def false_negative_posterior(
    similarity: jax.Array,
    stats: SimilarityStatistics,
    prior: float = 1e-4,
    *,
    monotone: bool = False,
) -> jax.Array:
    """Returns the probability that a candidate of this similarity is an unlabelled match.

    Bayes' rule over the two Gaussians, as the sigmoid of a log-odds so that it is finite for any
    similarity. The log-odds is a parabola in the similarity: where the variances differ it turns
    round at its vertex, and beyond it the authors' formula calls a lower similarity likelier to
    be a match (or a higher one less likely).

    >>> import jax.numpy as jnp
    >>> stats = SimilarityStatistics(
    ...     positive=GaussianStatistics.from_moments(500, mean=0.7, variance=0.01),
    ...     negative=GaussianStatistics.from_moments(1000, mean=0.4, variance=0.02),
    ... )
    >>> posterior = false_negative_posterior(jnp.array([0.4, 0.6, 0.8]), stats, prior=0.1)
    >>> [f"{p:.3f}" for p in posterior]
    ['0.002', '0.206', '0.839']

    Args:
      similarity: Cosine similarities of any shape.
      stats: The similarity statistics.
      prior: Share of candidates that are unlabelled matches, in (0, 1); 1e-4 in the paper.
      monotone: Whether the posterior is held at the vertex's value on the falling side of the
        parabola, so that it never falls as similarity rises; False keeps the authors' formula.

    Returns:
      The float32 posterior in [0, 1], shaped as `similarity`, without gradient; the prior itself
      while either distribution has seen fewer than two values.

    Raises:
      ValueError: if the prior is outside (0, 1).

    References:
      Li et al., Your Negative May not Be True Negative, ACM MM 2023, arXiv 2308.04380, section 3.2.
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


def can_suspect(stats: SimilarityStatistics, min_count: int) -> bool:
    """Returns whether statistics on the host have seen as many pairs as the loss asks for."""
    count = stats.positive.count
    return bool(count > min_count and min(count, stats.negative.count) >= 2)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the [n, m] float32 products of the rows of [n, dim] and [m, dim].

    They are computed in full precision on every backend: TPUs and recent GPUs would otherwise
    round the inputs to bfloat16 or TF32, an error of the size of the margins between hard
    negatives.
    """
    return jnp.matmul(
        a.astype(jnp.float32), b.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST
    )


def _log_density(similarity, gaussian):
    """Returns the Gaussian log density without the constant that both distributions share."""
    variance = jnp.maximum(gaussian.variance, MIN_VARIANCE)
    return -0.5 * (jnp.square(similarity - gaussian.mean) / variance + jnp.log(variance))


def _onto_rising_branch(similarity, stats):
    """Returns the similarities, those on the falling side of the parabola moved to its vertex."""
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

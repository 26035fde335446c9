"""What a frozen teacher says of the pairs of a step, by embeddings of the training split.

Its similarities are soft targets for those of the batch (`soft_target_loss`), and tell which
candidates are left out since they may match (`Teacher.left_out`).
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.objectives import checks
from fne_jax.objectives.features import Features, Matches
from fne_jax.objectives.similarity_statistics import cosine


@flax.struct.dataclass
class Teacher:
    """A teacher's embeddings of a split.

    Attributes:
      image: [images, dim] float16, L2-normalised.
      text: [pairs, dim] float16, L2-normalised.
      caption_image: [pairs] int32 number of each caption's own image.
      margin: By how much less than the positive a candidate may be similar to the anchor and yet be
        left out; None leaves out none.
    """

    image: jax.Array | np.ndarray
    text: jax.Array | np.ndarray
    caption_image: jax.Array | np.ndarray
    margin: float | None = flax.struct.field(pytree_node=False)

    def of_pairs(self, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the [n, dim] embeddings of image and caption of [n] int32 numbers of pairs."""
        image = jnp.asarray(self.caption_image)[pair]
        return jnp.asarray(self.image)[image], jnp.asarray(self.text)[pair]

    def left_out(
        self, known: Matches | None, pair_id: jax.Array, queue_pair_id: jax.Array
    ) -> Matches | None:
        """Returns the known matches, and with them what the teacher leaves out, which weighs 0.

        That is, a candidate that it finds more similar to the anchor than the anchor's positive
        less the margin; within the batch, to the image or to the caption. What else is known are
        masks, or None. Numbers of pairs are as of `matches_of_step`; empty slots are not left out.

        References:
          Solatorio, GISTEmbed, arXiv 2402.16829; Moreira et al., NV-Retriever, arXiv 2407.15831.
        """
        if self.margin is None:
            return known
        image, text = self.of_pairs(pair_id)
        slot_image, slot_text = self.of_pairs(jnp.maximum(queue_pair_id, 0))
        similarity, filled = cosine(image, text), (queue_pair_id >= 0)[None, :]
        least = jnp.diagonal(similarity)[:, None] - self.margin
        found = Matches(
            batch=similarity > jnp.minimum(least, least.T),
            queue_text=filled & (cosine(image, slot_text) > least),
            queue_image=filled & (cosine(text, slot_image) > least),
            weight=jnp.zeros_like(similarity),
        )
        if known is None:
            return found
        masks = ((one.batch, one.queue_text, one.queue_image) for one in (found, known))
        weight = known.batch.astype(jnp.float32) if known.weight is None else known.weight
        return Matches(*jax.tree.map(jnp.logical_or, *masks), weight=weight)


def soft_target_loss(
    features: Features,
    *,
    cross_weight: float = 0.1,
    own_weight: float = 0.5,
    temperature: float = 0.45,
    teacher_temperature: float = 1.0,
) -> jax.Array:
    """Returns how far the batch's similarities are from those of the teacher.

    The targets of an image are the teacher's similarities of that image to the batch's images; they
    are those of its similarities to captions (across) and to images (within its own modality).
    Captions have the teacher's similarities among captions likewise.

    Args:
      features: The embeddings of the batch, with `teacher`.
      cross_weight: Weight of the divergence across modalities, at least 0.
      own_weight: Weight of the divergence within each, at least 0.
      temperature: Divisor of the model's similarities, above 0.
      teacher_temperature: Divisor of the teacher's, above 0.

    Returns the [] float32 sum of both weighted Kullback-Leibler divergences of softmax
    distributions, each the mean over the anchors of both directions. Raises ValueError without a
    teacher.

    References:
      Huang et al., Cross-modal and Uni-modal Soft-label Alignment for Image-Text Retrieval, AAAI
      2024, arXiv 2403.05261. There the temperature is learned, beginning at this one, and the own
      modality has a projection of its own.
    """
    checks.in_range("temperature", temperature, 0, low_open=True)
    checks.in_range("teacher_temperature", teacher_temperature, 0, low_open=True)
    image, text = features.image, features.text

    def divergence(teacher, pairs):
        target = jax.nn.log_softmax(cosine(teacher, teacher) / teacher_temperature, axis=1)
        found = jax.nn.log_softmax(cosine(*pairs) / temperature, axis=1)
        return (jnp.exp(target) * (target - found)).sum(axis=1).mean()

    if features.teacher is None:
        raise ValueError("features.teacher: expected the teacher's embeddings of the batch")
    of_image, of_text = features.teacher
    across = divergence(of_image, (image, text)) + divergence(of_text, (text, image))
    own = divergence(of_image, (image, image)) + divergence(of_text, (text, text))
    return (cross_weight * across + own_weight * own) / 2

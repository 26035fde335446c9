"""The embeddings of a batch, and the keys that either direction of retrieval compares them with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from fne_jax.objectives import checks
from fne_jax.objectives.memory_queue import EMPTY_ID, MemoryQueue

# Of matches that are known by their probability, in 255ths.
PROBABILITY = jnp.uint8


@flax.struct.dataclass
class Matches:
    """Which images and captions of a step are known to match, labelled or not.

    `fne_jax.objectives.known_matches` looks them up. Objectives leave them out wherever they would
    be negatives; own pairs stay what they are.

    The first three arrays may be uint8 instead, the probability of a match in 255ths. Nothing is
    left out then, and FNE takes it for its posterior.

    >>> import jax.numpy as jnp
    >>> from fne_jax.objectives.contrastive import infonce_loss
    >>> image_emb = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> text_emb = jnp.array([[0.8, 0.6], [0.6, 0.8]])
    >>> features = Features(image_emb, text_emb, image_emb, text_emb, jnp.arange(2))
    >>> # The caption of pair 1 also matches the image of pair 0, which have no negative then.
    >>> matches = Matches(batch=jnp.array([[True, True], [False, True]]))
    >>> for known in (None, matches):
    ...     loss, _ = infonce_loss(features.replace(matches=known), temperature=0.1)
    ...     print(f"{loss:.3f}")
    0.127
    0.063

    Attributes:
      batch: [batch, batch] bool, true where the image of pair i (row) matches the caption of pair
        j (column).
      queue_text: [batch, size] bool, true where the image of pair i matches the caption in a slot
        of the queue; None without a queue.
      queue_image: [batch, size] bool, true where the caption of pair i matches the image in a slot
        of the queue; None without a queue.
      weight: [batch, batch] float32 from 0 to 1, how much each of the batch's counts as a positive
        in losses of several; 0 only leaves it out of the negatives. None counts each as 1.
    """

    batch: jax.Array
    queue_text: jax.Array | None = None
    queue_image: jax.Array | None = None
    weight: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class RowSplit:
    """How devices share the rows of an array.

    `rows` returns an array of which each device holds its part of the rows, which must divide.
    """

    devices: int = 1
    rows: Callable[[jax.Array], jax.Array] = lambda array: array


# One device has all rows.
NOT_SPLIT = RowSplit()


@flax.struct.dataclass
class Features:
    """The embeddings of a batch of matching pairs, L2-normalised; row i of each is pair i.

    Attributes:
      image: [batch, dim] online image embeddings.
      text: [batch, dim] online text embeddings of the matching captions.
      momentum_image: [batch, dim] the momentum encoder's embeddings of the same images. Losses
        within the batch need neither these nor the next.
      momentum_text: [batch, dim] the momentum encoder's embeddings of the same captions.
      image_id: [batch] integer ids of the images; keys with the anchor's id are never its
        negatives. Losses within the batch go by `same_image`, and take None for ids that differ.
      same_image: [batch, batch] bool, true for images (rows) and captions that are no negatives of
        each other in losses and statistics within the batch, such as those of one image; None
        leaves only the diagonal out, as the authors do.
      matches: Known matches, which are no negatives either; None where none are known.
      learned: What an objective learns beside the encoders, as `learned_scalars.initial` begins
        it; None where all its numbers are fixed.
      teacher: A teacher's [batch, dim] embeddings of the images and of the captions, L2-normalised;
        None without one.
      split: The devices that share the scoring of the queue, though each holds all of it.
    """

    image: jax.Array
    text: jax.Array
    momentum_image: jax.Array | None = None
    momentum_text: jax.Array | None = None
    image_id: jax.Array | None = None
    same_image: jax.Array | None = None
    matches: Matches | None = None
    learned: Mapping[str, jax.Array] | None = None
    teacher: tuple[jax.Array, jax.Array] | None = None
    split: RowSplit = flax.struct.field(pytree_node=False, default=NOT_SPLIT)

    def __post_init__(self):
        """Raises ValueError if ids need 64 bits: `jax.jit` would cut them before a loss looks."""
        checks.fit_int32("image_id", self.image_id)

    @property
    def own(self) -> jax.Array:
        """[batch, batch] bool, true for the image (row) and the caption of one pair."""
        return jnp.eye(len(self.image), dtype=bool)

    @property
    def labelled(self) -> jax.Array:
        """[batch, batch] bool, true for an image (row) and the captions of that image."""
        if self.image_id is None:
            return self.own
        return self.image_id[:, None] == self.image_id[None, :]

    @property
    def positive_weight(self) -> jax.Array:
        """[batch, batch] float32: 1 of an image (row) and its captions, matches as they weigh."""
        weight = self.labelled.astype(jnp.float32)
        if self.matches is None or self.matches.batch.dtype == PROBABILITY:
            return weight
        known = self.matches.batch.astype(jnp.float32)
        if self.matches.weight is not None:
            known *= self.matches.weight.astype(jnp.float32)
        return jnp.maximum(weight, known)

    @property
    def excluded(self) -> jax.Array:
        """[batch, batch] bool, true for images (rows) and captions that are no negatives."""
        excluded = self.own if self.same_image is None else self.own | self.same_image
        return apart(excluded, None if self.matches is None else self.matches.batch)[0]


class Direction(NamedTuple):
    """One direction of retrieval: what asks, and the keys that may answer.

    Attributes:
      anchor: [batch, dim] online embeddings of one modality.
      batch_keys: [batch, dim] momentum embeddings of the other; key i matches anchor i.
      image_id: [batch] integer image ids of both.
      queue_keys: [size, dim] the queue's embeddings of the other, or None without a queue.
      queue_id: [size] their image ids, or None without a queue.
      batch_matches: [batch, batch] what is known of an anchor (row) and a key of the batch, as in
        `Matches`; None where nothing is known.
      queue_matches: [batch, size] the same of the queue's keys, or None.
    """

    anchor: jax.Array
    batch_keys: jax.Array
    image_id: jax.Array
    queue_keys: jax.Array | None
    queue_id: jax.Array | None
    batch_matches: jax.Array | None = None
    queue_matches: jax.Array | None = None

    def excluded(self) -> tuple[jax.Array, jax.Array | None]:
        """Returns which keys are no negatives of an anchor: its image's, and its known matches.

        They are [batch, batch] bool, own matches included; and [batch, size] bool, empty slots
        included, or None without a queue.
        """
        in_batch = self.image_id[:, None] == self.image_id[None, :]
        in_batch, _ = apart(in_batch, self.batch_matches)
        if self.queue_id is None:
            return in_batch, None
        in_queue = self.image_id[:, None] == self.queue_id[None, :]
        in_queue = in_queue | (self.queue_id == EMPTY_ID)[None, :]
        return in_batch, apart(in_queue, self.queue_matches)[0]

    def probability(self, index: jax.Array) -> jax.Array | None:
        """Returns how likely keys match the anchors by what is known; None if only masks are.

        The [batch] float32 probabilities are those of an int32 key for each anchor: the batch's
        come first, then the queue's.
        """
        batch = len(self.anchor)
        known = self.batch_matches
        if known is None or known.dtype != PROBABILITY:
            return None
        found = _of_keys(known, jnp.minimum(index, batch - 1))
        if self.queue_matches is not None:
            of_queue = _of_keys(self.queue_matches, jnp.maximum(index - batch, 0))
            found = jnp.where(index < batch, found, of_queue)
        return as_probability(found)


def _of_keys(known, index):
    return jnp.take_along_axis(jnp.asarray(known), index[:, None], axis=1)[:, 0]


def apart(excluded: jax.Array, known: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Returns which keys are no negatives, and the float32 probability that others match, or None.

    `excluded` is true for keys that are no negatives whatever is known, and `known` what is known
    of them as in `Matches`, masks or probabilities; None for nothing.
    """
    if known is None:
        return excluded, None
    if known.dtype == PROBABILITY:
        return excluded, as_probability(known)
    return excluded | known, None


def as_probability(grade: jax.Array) -> jax.Array:
    """Returns the float32 probability that uint8 255ths stand for."""
    return grade.astype(jnp.float32) / 255


def directions(features: Features, queue: MemoryQueue | None) -> tuple[Direction, Direction]:
    """Returns the two directions: images that ask among texts, and texts among images.

    Raises ValueError if the batch lacks momentum embeddings or ids, or what is there does not fit.
    """
    image_keys, text_keys = features.momentum_image, features.momentum_text
    image_id, matches = features.image_id, features.matches
    if image_keys is None or text_keys is None or image_id is None:
        raise ValueError(
            "momentum_image, momentum_text, image_id: expected arrays, as this loss compares with "
            "keys, got None"
        )
    check_features(features)
    texts = images = ids = None
    if queue is not None:
        _check_queue(queue, features)
        texts, images, ids = queue.text, queue.image, queue.image_id
    of_images = of_texts = (None, None)
    if matches is not None:
        of_images = matches.batch, matches.queue_text
        of_texts = matches.batch.T, matches.queue_image
    return (
        Direction(features.image, text_keys, image_id, texts, ids, *of_images),
        Direction(features.text, image_keys, image_id, images, ids, *of_texts),
    )


def check_features(features: Features) -> None:
    """Raises ValueError unless all that is given of a batch fits together."""
    names = "image", "text", "momentum_image", "momentum_text"
    given = {name: getattr(features, name) for name in names}
    batch, _ = checks.embeddings(**{name: emb for name, emb in given.items() if emb is not None})
    if features.image_id is not None:
        checks.ids("image_id", features.image_id, batch)
    if features.same_image is not None:
        checks.mask("same_image", features.same_image, (batch, batch))
    if features.matches is not None:
        _check_known("matches.batch", features.matches.batch, (batch, batch))
        if features.matches.weight is not None:
            checks.shape("matches.weight", features.matches.weight, (batch, batch))


def _check_queue(queue, features):
    batch, dim = features.image.shape
    checks.shape("queue.image", queue.image, (queue.size, dim))
    checks.shape("queue.text", queue.text, (queue.size, dim))
    checks.ids("queue.image_id", queue.image_id, queue.size)
    known = features.matches
    if known is None:
        return
    for name, mask in (("queue_text", known.queue_text), ("queue_image", known.queue_image)):
        if mask is None:
            raise ValueError(f"matches.{name}: expected [batch, size] bool, as there is a queue")
        if mask.dtype != known.batch.dtype:
            raise ValueError(
                f"matches.{name}: expected the dtype of matches.batch, got {mask.dtype}"
            )
        _check_known(f"matches.{name}", mask, (batch, queue.size))


def _check_known(name, known, expected):
    checks.shape(name, known, expected)
    if known.dtype != PROBABILITY:
        checks.mask(name, known)

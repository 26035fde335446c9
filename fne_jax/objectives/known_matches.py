"""Tables of known matches on the devices, and what they say of a step's pairs.

Which captions match which images is data, too large to be a constant of the train step's program:
the step takes a table as an argument, and looks its batch and the queue up. A table tells by the
number of an image in its split and by that of a pair (a caption), both of any shape:

>>> import numpy as np
>>> caption_image = np.array([0, 0, 1], np.int32)  # two captions of image 0, one of image 1
>>> truth = np.array([[True, True, True], [False, False, True]])  # [images, pairs]
>>> bits = np.packbits(truth.T, axis=1, bitorder="little")
>>> complete = CompleteMatches.create(bits, caption_image)
>>> complete.match(np.array([0, 1]), np.array([2, 0])).tolist()
[True, False]
>>> further = {"image": np.array([0]), "pair": np.array([2])}
>>> listed = ListedMatches.create(**further, caption_image=caption_image, probability=[0.8])
>>> listed.probability(np.array([0, 1, 1]), np.array([2, 0, 2])).tolist()  # in 255ths
[204, 0, 255]
>>> matches_of_step(listed, np.array([0, 2]), np.array([2, -1])).queue_text.tolist()
[[True, False], [True, False]]
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.objectives.features import Matches, as_probability


@flax.struct.dataclass
class CompleteMatches:
    """The truth about every image and caption of a split, a bit for each.

    Attributes:
      bits: [pairs, ceil(images / 8)] uint8; bit i % 8 (0 is the lowest) of byte i // 8 tells
        whether the caption matches image i.
      caption_image: [pairs] int32 number of each caption's own image.
    """

    bits: jax.Array | np.ndarray
    caption_image: jax.Array | np.ndarray

    @classmethod
    def create(cls, bits: np.ndarray, caption_image: np.ndarray) -> CompleteMatches:
        """Returns the table of NumPy arrays, still on the host."""
        if bits.dtype != np.uint8 or bits.ndim != 2 or len(bits) != len(caption_image):
            raise ValueError(
                f"bits: expected uint8 of shape [{len(caption_image)}, ceil(images / 8)], got "
                f"{bits.dtype} of shape {bits.shape}"
            )
        return cls(bits, np.asarray(caption_image, np.int32))

    def match(self, image: jax.Array, pair: jax.Array) -> jax.Array:
        """Returns whether images match the captions of pairs: bool, of the shape to which both go.

        Both are int32 numbers of at least 0, of any shape.
        """
        byte = jnp.asarray(self.bits)[pair, jnp.asarray(image) // 8]
        return (byte >> (jnp.asarray(image) % 8).astype(jnp.uint8)) & 1 == 1


@flax.struct.dataclass
class ListedMatches:
    """The matches that a list names, such as verdicts or a detector's finds, for any split.

    Attributes:
      image: [matches] int32 numbers of images, in increasing order within each pair.
      grade: [matches] uint8, the probability of each match in 255ths.
      start: [pairs + 1] int32, where each pair's images begin, and the end of the last.
      caption_image: [pairs] int32 number of each caption's own image.
      longest: The most images of a pair, which the program depends on.
      is_posterior: Whether a step is told the probabilities, for FNE to suspect by, in place of
        what matches.
    """

    image: jax.Array | np.ndarray
    grade: jax.Array | np.ndarray
    start: jax.Array | np.ndarray
    caption_image: jax.Array | np.ndarray
    longest: int = flax.struct.field(pytree_node=False)
    is_posterior: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        image: np.ndarray,
        pair: np.ndarray,
        caption_image: np.ndarray,
        probability: np.ndarray | None = None,
        *,
        is_posterior: bool = False,
    ) -> ListedMatches:
        """Returns the table of a list in any order, still on the host; own matches are added.

        Args:
          image: [matches] integer numbers of images.
          pair: [matches] integer numbers of pairs that match them.
          caption_image: [pairs] integer number of each caption's own image.
          probability: [matches] probability of each match, from 0 to 1, the highest of a pair that
            is listed several times; None for 1, that of own matches.
          is_posterior: See the class.
        """
        pairs = len(caption_image)
        image, pair = np.asarray(image, np.int64), np.asarray(pair, np.int64)
        if len(pair) and not (min(image.min(), pair.min()) >= 0 and pair.max() < pairs):
            raise ValueError(f"image, pair: expected numbers from 0, of pairs below {pairs}")
        probability = np.ones(len(pair)) if probability is None else np.asarray(probability)
        grade = np.rint(255 * probability.astype(np.float32)).astype(np.uint8)
        order = np.argsort(grade, kind="stable")[::-1]
        # Of a pair that stands there several times the first is kept.
        pair = np.concatenate([np.arange(pairs), pair[order]])
        image = np.concatenate([np.asarray(caption_image, np.int64), image[order]])
        grade = np.concatenate([np.full(pairs, 255, np.uint8), grade[order]])
        width = 1 + image.max()
        key, first = np.unique(pair * width + image, return_index=True)
        start = np.searchsorted(key, width * np.arange(pairs + 1))
        return cls(
            image=image[first].astype(np.int32),
            grade=grade[first],
            start=start.astype(np.int32),
            caption_image=np.asarray(caption_image, np.int32),
            longest=int(np.diff(start).max()),
            is_posterior=is_posterior,
        )

    def match(self, image: jax.Array, pair: jax.Array) -> jax.Array:
        """As `CompleteMatches.match`, whatever the probability."""
        return self._find(image, pair)[1]

    def probability(self, image: jax.Array, pair: jax.Array) -> jax.Array:
        """Returns the uint8 probabilities of matches in 255ths, 0 of what is not listed."""
        place, found = self._find(image, pair)
        return jnp.where(found, jnp.asarray(self.grade)[place], jnp.uint8(0))

    def _find(self, image, pair):
        """Returns where pairs stand, by a binary search in their images, and whether they do."""
        image, pair = jnp.broadcast_arrays(jnp.asarray(image), jnp.asarray(pair))
        images, start = jnp.asarray(self.image), jnp.asarray(self.start)
        low, end = start[pair], start[pair + 1]
        high = end
        # The first of the pair's images that is not below the one looked for lies in [low, high].
        for _ in range(self.longest.bit_length()):
            middle = (low + high) // 2
            below = (middle < high) & (images[jnp.minimum(middle, len(images) - 1)] < image)
            low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
        place = jnp.minimum(low, len(images) - 1)
        return place, (images[place] == image) & (low < end)


KnownMatches = CompleteMatches | ListedMatches


def matches_of_step(known: KnownMatches, pair_id: jax.Array, queue_pair_id: jax.Array) -> Matches:
    """Returns what a table says of the pairs of a batch and of the queue, masks or probabilities.

    `pair_id` [batch] and `queue_pair_id` [size] are int32 numbers of pairs in the table's split;
    empty slots, which are below 0, match nothing.
    """
    caption_image = jnp.asarray(known.caption_image)
    image = caption_image[pair_id]
    filled = (queue_pair_id >= 0)[None, :]
    slot = jnp.maximum(queue_pair_id, 0)
    in_batch = image[:, None], pair_id[None, :]
    look_up, weight = known.match, None
    if isinstance(known, ListedMatches):
        weight = as_probability(known.probability(*in_batch))
        look_up = known.probability if known.is_posterior else known.match

    def in_queue(image, pair):
        found = look_up(image, pair)
        return jnp.where(filled, found, jnp.zeros_like(found))

    return Matches(
        batch=look_up(*in_batch),
        queue_text=in_queue(image[:, None], slot[None, :]),
        queue_image=in_queue(caption_image[slot][None, :], pair_id[:, None]),
        weight=weight,
    )

"""What is known of a pair of a caption and an image that is not its own, as numbers.

All from which a reviewer's answer can be foretold without looking: how similar the two are, by
itself and beside what else is similar to either; how near the caption comes to what is said of the
image already; and how near the image comes to the caption's own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from fne_jax.false_negatives.own_captions import (
    CaptionTerms,
    OwnCaptions,
    nearest_own_caption,
    term_shares,
)
from fne_jax.false_negatives.unlabelled import unlabelled_pairs

# The features, and whether a higher one speaks for a match (1), against it (-1) or either way (0).
FEATURES = {
    "similarity": 1,  # cosine of the two
    "lead": 1,  # how far that exceeds the caption's similarity to its own image
    "lead_of_image": 1,  # how far it exceeds the image's highest similarity to an own caption
    # How many standard deviations it lies above the mean over random images, and over random
    # captions: the rank of the pair among the caption's images and among the image's captions, by
    # two numbers for each of them rather than by all similarities.
    "rank_of_image": 1,
    "rank_of_caption": 1,
    "nearest_caption": 1,  # cosine of the caption and the nearest of the image's own
    "image_similarity": 1,  # cosine of the image and the caption's own
    "words_found": 1,  # share of the caption's terms, by weight, in the image's own captions
    "words_in_one": 1,  # the same in the best single one of them
    "words_missing": -1,  # weight of the terms that are in none
    "words": 0,  # how many terms the caption has
}
# How many of each caption and of each image are its hardest.
HARDEST = 20
# Random images, and captions, that ranks are told by.
_OTHERS = 1000
_SEED = 0
# Pairs, and rows of similarities to the random others, that are held at once.
_BLOCK_PAIRS, _BLOCK_ROWS = 16_384, 1024


@dataclasses.dataclass(frozen=True)
class SplitInputs:
    """A split as a model sees it.

    Attributes:
      image_emb: [images, dim] float32, L2-normalised, by the encoder that is trained.
      text_emb: [captions, dim] float32, L2-normalised, by the same.
      caption_bank: [captions, width] float32, L2-normalised, by the momentum text encoder, or by
        the other where there is none.
      captions: [captions] texts.
      caption_image: [captions] int row of each caption's image.
    """

    image_emb: np.ndarray
    text_emb: np.ndarray
    caption_bank: np.ndarray
    captions: Sequence[str]
    caption_image: np.ndarray

    @property
    def unlabelled(self) -> int:
        """The number of pairs of a caption and an image that is not its own."""
        return len(self.captions) * (len(self.image_emb) - 1)

    @functools.cached_property
    def own(self) -> OwnCaptions:
        """The captions of each image."""
        return OwnCaptions.of(self.caption_image, len(self.image_emb))

    @functools.cached_property
    def terms(self) -> CaptionTerms:
        """The terms of the captions."""
        return CaptionTerms.of(self.captions, self.own)

    @functools.cached_property
    def own_similarity(self) -> np.ndarray:
        """[captions] float32, of each caption to its own image."""
        return self.similarity(np.arange(len(self.captions)), self.caption_image)

    @functools.cached_property
    def best_own_similarity(self) -> np.ndarray:
        """[images] float32, the highest of each image to an own caption; -1 where it has none."""
        best = np.full(len(self.image_emb), -1, np.float32)
        np.maximum.at(best, self.caption_image, self.own_similarity)
        return best

    @functools.cached_property
    def to_random_images(self) -> tuple[np.ndarray, np.ndarray]:
        """[captions] mean and standard deviation of each one's similarity to random images."""
        return _mean_and_deviation(self.text_emb, self.image_emb)

    @functools.cached_property
    def to_random_captions(self) -> tuple[np.ndarray, np.ndarray]:
        """[images] mean and standard deviation of each one's similarity to random captions."""
        return _mean_and_deviation(self.image_emb, self.text_emb)

    @functools.cached_property
    def hardest(self) -> np.ndarray:
        """[n] int64, rising, `caption * images + image` of the `HARDEST` of each of either."""
        embeddings = self.image_emb, self.text_emb, self.caption_image
        pairs = unlabelled_pairs(*embeddings, per_query=HARDEST, relative=False)
        return np.sort(pairs.caption * len(self.image_emb) + pairs.image)

    def similarity(self, caption: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Returns the [n] float32 cosines of [n] captions and [n] images."""
        found = np.empty(len(caption), np.float32)
        for start in range(0, len(caption), _BLOCK_PAIRS):
            part = slice(start, start + _BLOCK_PAIRS)
            found[part] = _cosine(self.text_emb[caption[part]], self.image_emb[image[part]])
        return found


def features(split: SplitInputs, caption: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Returns the features of pairs.

    Fifteen million pairs take about a minute of one core where embeddings have 128 dimensions and
    images five captions; beside the result little is held, whatever the number of pairs.

    Args:
      split: The split.
      caption: [n] int caption of each pair.
      image: [n] int image of each pair, not the caption's own.

    Returns:
      [n, features] float32, in the order of `FEATURES`.

    Raises:
      ValueError: if an image is the caption's own, of which the features would tell that.
    """
    caption, image = np.asarray(caption), np.asarray(image)
    own = np.flatnonzero(split.caption_image[caption] == image)
    if len(own):
        raise ValueError(f"image: {len(own)} pairs are of a caption and its own image")
    found = np.empty((len(caption), len(FEATURES)), np.float32)
    # In the order of the images, so that what is looked up of one is at hand for all its pairs.
    order = np.argsort(image, kind="stable")
    for start in range(0, len(caption), _BLOCK_PAIRS):
        part = order[start : start + _BLOCK_PAIRS]
        columns = _columns(split, caption[part], image[part])
        for number, name in enumerate(FEATURES):
            found[part, number] = columns[name]
    return found


def _columns(split, caption, image):
    similarity = split.similarity(caption, image)
    mean_of_image, deviation_of_image = (table[caption] for table in split.to_random_images)
    mean_of_caption, deviation_of_caption = (table[image] for table in split.to_random_captions)
    image_emb = split.image_emb[image]
    found, in_one, weight = term_shares(split.terms, split.own, caption, image)
    return {
        "similarity": similarity,
        "lead": similarity - split.own_similarity[caption],
        "lead_of_image": similarity - split.best_own_similarity[image],
        "rank_of_image": (similarity - mean_of_image) / deviation_of_image,
        "rank_of_caption": (similarity - mean_of_caption) / deviation_of_caption,
        "nearest_caption": nearest_own_caption(split.caption_bank, split.own, caption, image)[0],
        "image_similarity": _cosine(split.image_emb[split.caption_image[caption]], image_emb),
        "words_found": found,
        "words_in_one": in_one,
        "words_missing": (1 - found) * weight,
        "words": np.count_nonzero(split.terms.term[caption] >= 0, axis=1),
    }


def _cosine(ours, theirs):
    return np.einsum("pd,pd->p", ours, theirs)


def _mean_and_deviation(query_emb, item_emb):
    """Returns two [queries] float32 over the similarities to the same random items."""
    rows = np.random.default_rng(_SEED).permutation(len(item_emb))[:_OTHERS]
    items = item_emb[rows]
    mean, deviation = np.empty((2, len(query_emb)), np.float32)
    for start in range(0, len(query_emb), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        similarity = query_emb[part] @ items.T
        mean[part], deviation[part] = similarity.mean(axis=1), similarity.std(axis=1)
    return mean, np.maximum(deviation, 1e-6)

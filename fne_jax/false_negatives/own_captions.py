"""How near a caption comes to what is said of an image already: to the image's own captions."""

from __future__ import annotations

import dataclasses
import itertools
import unicodedata
from collections.abc import Sequence

import numpy as np

# Pairs whose embeddings are held at once.
_BLOCK_PAIRS = 16_384
# Bits of an unsigned integer, one for each caption of an image.
_HOLDERS = 64


@dataclasses.dataclass(frozen=True)
class OwnCaptions:
    """The captions of each image.

    Attributes:
      caption_image: [captions] image of each caption.
      order: [captions] captions in the order of their images.
      first: [images] where those of an image begin in `order`.
      count: [images] how many they are.
    """

    caption_image: np.ndarray
    order: np.ndarray
    first: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, caption_image: np.ndarray, images: int) -> OwnCaptions:
        """Returns the captions of each image."""
        count = np.bincount(caption_image, minlength=images)
        order = np.argsort(caption_image, kind="stable")
        return cls(np.asarray(caption_image), order, np.cumsum(count) - count, count)

    def column(self, image: np.ndarray, number: int) -> np.ndarray:
        """Returns [n], an own caption of each of [n] images, which all have more than `number`."""
        return self.order[self.first[image] + number]


def nearest_own_caption(
    text_emb: np.ndarray, own: OwnCaptions, caption: np.ndarray, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for pairs how near the caption is to the nearest of the image's own captions.

    The caption itself is no neighbour of its own: for a caption and its own image it is the
    nearest of the others, by leaving one out.

    The pairs are [pairs] captions and [pairs] images; `text_emb` is [captions, dim], L2-normalised.

    Returns:
      [pairs] float32 cosines and [pairs] int64 captions; both -1 where the image has no other
      caption.
    """
    cosine = np.full(len(caption), -1, np.float32)
    nearest = np.full(len(caption), -1)
    for start in range(0, len(caption), _BLOCK_PAIRS):
        part = np.arange(start, min(start + _BLOCK_PAIRS, len(caption)))
        for number in range(int(own.count[image[part]].max())):
            rows = part[own.count[image[part]] > number]
            other = own.column(image[rows], number)
            rows, other = rows[other != caption[rows]], other[other != caption[rows]]
            found = np.einsum("pd,pd->p", text_emb[caption[rows]], text_emb[other])
            nearer = (found > cosine[rows]) | (nearest[rows] < 0)
            cosine[rows[nearer]] = found[nearer]
            nearest[rows[nearer]] = other[nearer]
    return cosine, nearest


@dataclasses.dataclass(frozen=True)
class CaptionTerms:
    """The terms of captions: their words, and pairs of neighbouring words, which tell order.

    "A cat on a dog" and "a dog on a cat" have the same words, but not the same pairs of them.

    Attributes:
      term: [captions, most] int32 different terms of each caption, then -1.
      weight: [terms] float32, the inverse document frequency of each: the logarithm of the number
        of captions, and one, for each caption with the term.
      key: [n] int64, rising, `image * terms + term` of all terms of the images' captions.
      count: [n] the captions of the image that have the term.
      holders: [n] uint64, bit k tells whether the image's caption k has the term; the captions
        after the 64th share its bits from the first on.
    """

    term: np.ndarray
    weight: np.ndarray
    key: np.ndarray
    count: np.ndarray
    holders: np.ndarray

    @classmethod
    def of(cls, captions: Sequence[str], own: OwnCaptions) -> CaptionTerms:
        """Returns the terms of captions."""
        numbers: dict[str | tuple[str, str], int] = {}
        of_caption = []
        for text in captions:
            words = normalised(text).split()
            terms = dict.fromkeys([*words, *itertools.pairwise(words)])
            of_caption.append([numbers.setdefault(term, len(numbers)) for term in terms])
        length = np.array([len(terms) for terms in of_caption])
        term = np.full((len(captions), max(1, length.max(initial=0))), -1, np.int32)
        term[np.arange(term.shape[1]) < length[:, None]] = list(itertools.chain(*of_caption))
        caption, column = np.nonzero(term >= 0)
        frequency = np.bincount(term[caption, column], minlength=len(numbers))
        weight = np.log((1 + len(captions)) / frequency).astype(np.float32)
        image = own.caption_image[caption].astype(np.int64)
        key = image * len(numbers) + term[caption, column]
        position = np.empty(len(captions), np.int64)
        position[own.order] = np.arange(len(captions)) - own.first[own.caption_image[own.order]]
        bit = np.left_shift(np.uint64(1), (position[caption] % _HOLDERS).astype(np.uint64))
        order = np.argsort(key, kind="stable")
        key, first, count = np.unique(key[order], return_index=True, return_counts=True)
        holders = np.bitwise_or.reduceat(bit[order], first) if len(key) else bit
        return cls(term, weight, key, count, holders)


def term_share(
    terms: CaptionTerms, own: OwnCaptions, caption: np.ndarray, image: np.ndarray
) -> np.ndarray:
    """Returns for pairs how much of the caption is in terms of the image's own captions.

    For a caption and its own image only the others count, by leaving one out.

    The pairs are [pairs] captions and [pairs] images.

    Returns:
      [pairs] float32 in [0, 1], the share of the caption's weight that is in such terms; 0 for a
      caption without words.
    """
    share = np.zeros(len(caption), np.float32)
    if not len(terms.key):  # no caption has a word
        return share
    for start in range(0, len(caption), _BLOCK_PAIRS):
        part = slice(start, start + _BLOCK_PAIRS)
        weight, place = _lookup(terms, caption[part], image[part])
        is_own = own.caption_image[caption[part]] == image[part]
        there = (place >= 0) & (terms.count[place] > is_own[:, None])
        share[part] = _share(weight, there)
    return share


def term_shares(
    terms: CaptionTerms, own: OwnCaptions, caption: np.ndarray, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for pairs how much of the caption is in terms of the image's own captions.

    The pairs are [pairs] captions and [pairs] images, none the caption's own.

    Returns:
      [pairs] float32 share of the caption's weight that is in any of them, as `term_share`; the
      share that is in the best single one of them (captions of an image after its 64th are taken
      together with earlier ones); and the caption's weight.
    """
    in_any, in_one, total = np.zeros((3, len(caption)), np.float32)
    if not len(terms.key):
        return in_any, in_one, total
    for start in range(0, len(caption), _BLOCK_PAIRS):
        part = slice(start, start + _BLOCK_PAIRS)
        weight, place = _lookup(terms, caption[part], image[part])
        holders = np.where(place >= 0, terms.holders[place], np.uint64(0))
        in_any[part], total[part] = _share(weight, holders != 0), weight.sum(axis=1)
        most = min(_HOLDERS, int(own.count[image[part]].max()))
        for number in range(most):
            held = holders & np.left_shift(np.uint64(1), np.uint64(number)) != 0
            in_one[part] = np.maximum(in_one[part], _share(weight, held))
    return in_any, in_one, total


def _lookup(terms, caption, image):
    """Returns [pairs, most] weights of the captions' terms, 0 for none, and their places in `key`.

    The place of what no caption of the image has is -1.
    """
    term = terms.term[caption]
    key = image[:, None].astype(np.int64) * len(terms.weight) + term
    place = np.minimum(np.searchsorted(terms.key, key), len(terms.key) - 1)
    found = (terms.key[place] == key) & (term >= 0)
    return np.where(term >= 0, terms.weight[term], 0), np.where(found, place, -1)


def _share(weight, there):
    return (weight * there).sum(axis=1) / np.maximum(weight.sum(axis=1), 1e-12)


def identical_caption(
    captions: Sequence[str], own: OwnCaptions, caption: np.ndarray, image: np.ndarray
) -> np.ndarray:
    """Returns for pairs an own caption of the image that says the same as the caption.

    The pairs are [pairs] captions and [pairs] images.

    Returns:
      [pairs] int64 captions, never the pair's own; -1 where there is none. Texts say the same where
      they are equal but for case, punctuation and spaces; a text without a letter or a digit says
      nothing.
    """
    numbers: dict[str, int] = {"": -1}
    text = np.array([numbers.setdefault(normalised(one), len(numbers)) for one in captions])
    same = np.full(len(caption), -1)
    for number in range(int(own.count[image].max(initial=0))):
        rows = np.flatnonzero(own.count[image] > number)
        other = own.column(image[rows], number)
        equal = (text[other] == text[caption[rows]]) & (text[other] >= 0)
        equal &= (other != caption[rows]) & (same[rows] < 0)
        same[rows[equal]] = other[equal]
    return same


class _Letters(dict):
    """What `str.translate` puts in the place of each character, found as it is needed.

    Letters of any script stay, with their marks, without which Hindi, Thai or Hebrew says something
    else; so do digits and pictures such as emoji. What is invisible goes, all else ends a word.
    """

    def __missing__(self, code):
        kind = unicodedata.category(chr(code))
        kept = kind[0] in "LMN" or kind == "So" or code in _SKIN_TONES
        gone = kind == "Cf" or code in _VARIATION_SELECTORS
        self[code] = "" if gone else code if kept else " "
        return self[code]


_SKIN_TONES, _VARIATION_SELECTORS = range(0x1F3FB, 0x1F400), range(0xFE00, 0xFE10)
_LETTERS = _Letters()


def normalised(text: str) -> str:
    """Returns the words of a text in one case and one Unicode form, one space between them."""
    composed = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    return " ".join(composed.translate(_LETTERS).split())

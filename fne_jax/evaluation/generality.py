"""Image to text against the complete truth, controlled for how much captions say.

A caption that says little is true of more images than one that says much, so how high a system
ranks short captions in general moves its image-to-text metrics, whether or not it tells images
apart any better. The control takes this away from all systems alike: each caption's number of words
times a weight is subtracted from its similarities, and each system gets the weight that suits it
best on the validation split. Text to image needs none: there it would change all similarities of a
query alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fne_jax.evaluation.metric_names import COMPLETE, CONTROLLED, WEIGHT
from fne_jax.evaluation.metrics import match_scores

# The metrics that are controlled. Each has a weight of its own: short captions make up most true
# pairs, which mAP@R counts, while R@1 asks for a single sure caption.
KEYS = ("r1", "map_at_r")
# What a word may take off a similarity, in steps of a factor of sqrt(2) and the nearest to 0 first.
# Similarities lie in [-1, 1]: with 0.256 captions that differ by eight words change places whatever
# the image. Negative weights favour long captions.
_MAGNITUDES = tuple(0.002 * 2 ** (step / 2) for step in range(15))
WEIGHTS = (0.0, *(sign * size for size in _MAGNITUDES for sign in (1, -1)))


def word_counts(captions: Sequence[str]) -> np.ndarray:
    """Returns the [captions] float32 numbers of words, which blanks separate."""
    return np.array([len(caption.split()) for caption in captions], np.float32)


def choose_weights(
    image_emb: np.ndarray, text_emb: np.ndarray, matches: np.ndarray, words: np.ndarray
) -> dict[str, float]:
    """Returns for each of `KEYS` the one of `WEIGHTS` with which it is highest.

    Among equals it is the weight nearest to 0.

    Args:
      image_emb: [images, dim] L2-normalised embeddings of the validation split.
      text_emb: [texts, dim] L2-normalised embeddings.
      matches: [images, texts] bool, true where the caption is true of the image; each image needs
        a match.
      words: [texts] numbers of words.

    Raises ValueError, naming queries without a match.
    """
    found = [_metrics(image_emb, text_emb, matches, words, weight) for weight in WEIGHTS]
    return {key: WEIGHTS[int(np.argmax([one[key] for one in found]))] for key in KEYS}


def controlled_metrics(
    image_emb: np.ndarray,
    text_emb: np.ndarray,
    matches: np.ndarray,
    words: np.ndarray,
    weights: Mapping[str, float],
) -> dict[str, float]:
    """Returns the controlled metrics of a split, and the weights beside them.

    The arguments are those of `choose_weights`, and the weights that it chose on other images.

    Returns:
      `complete_i2t_r1_controlled` and `complete_i2t_map_at_r_controlled`, in percent, which are
      `match_scores`' metrics by similarity minus weight times words; and the weights,
      `complete_i2t_r1_weight` and `complete_i2t_map_at_r_weight`.

    Raises ValueError, naming queries without a match.
    """
    named = {}
    for key in KEYS:
        found = _metrics(image_emb, text_emb, matches, words, weights[key])
        named[f"{COMPLETE}i2t_{key}{CONTROLLED}"] = found[key]
        named[f"{COMPLETE}i2t_{key}{WEIGHT}"] = weights[key]
    return named


def _metrics(image_emb, text_emb, matches, words, weight):
    """Returns the metrics of images as queries, each word of a caption taking `weight` off."""
    # One dimension more, 1 in images, makes every product the similarity less the caption's share.
    one = np.ones((len(image_emb), 1), np.float32)
    share = -np.float32(weight) * np.asarray(words, np.float32)
    queries = np.concatenate([image_emb, one], axis=1)
    items = np.concatenate([text_emb, share[:, None]], axis=1)
    return match_scores(queries, items, matches, np.arange(len(image_emb))).metrics()

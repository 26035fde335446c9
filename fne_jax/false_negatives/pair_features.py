"""What is known of a pair of a caption and an image that is not its own, as numbers.

All from which a reviewer's answer can be foretold without looking: how similar the two are, by
itself and beside what else is similar to either; how near the caption comes to what is said of the
image already; and how near the image comes to the caption's own.
"""

from __future__ import annotations

import numpy as np

from fne_jax.false_negatives.fitted_detector import FEATURES
from fne_jax.false_negatives.judged_split import JudgedSplit
from fne_jax.false_negatives.own_captions import nearest_own_caption, term_shares

# Pairs that are looked at at once.
_BLOCK_PAIRS = 16_384


def features(split: JudgedSplit, caption: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Returns the features of pairs.

    Fifteen million pairs take about a minute of one core where embeddings have 128 dimensions and
    images five captions; beside the result little is held, whatever the number of pairs.

    The pairs are [n] int captions and [n] int images, none the caption's own.

    Returns:
      [n, features] float32, in the order of `FEATURES`.

    Raises ValueError if an image is the caption's own, of which the features would tell that.
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
    images = split.image_emb[split.caption_image[caption]], split.image_emb[image]
    found, in_one, weight = term_shares(split.terms, split.own, caption, image)
    return {
        "similarity": similarity,
        "lead": similarity - split.own_similarity[caption],
        "lead_of_image": similarity - split.best_own_similarity[image],
        "rank_of_image": (similarity - mean_of_image) / deviation_of_image,
        "rank_of_caption": (similarity - mean_of_caption) / deviation_of_caption,
        "nearest_caption": nearest_own_caption(split.caption_bank, split.own, caption, image)[0],
        "image_similarity": np.einsum("pd,pd->p", *images),
        "words_found": found,
        "words_in_one": in_one,
        "words_missing": (1 - found) * weight,
        "words": np.count_nonzero(split.terms.term[caption] >= 0, axis=1),
    }

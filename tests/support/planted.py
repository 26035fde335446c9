"""Splits whose unlabelled matches were planted: images that share their topic with others."""

import numpy as np

from fne_jax.false_negatives.pair_features import SplitInputs
from tests.support.embeddings import unit_rows


def planted_split(images, captions_each, *, topics, noise=0.5, seed=0):
    """Returns a split, and the topic of each image; images of one topic match their captions."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(topics, size=images)
    owner = rng.permutation(np.repeat(np.arange(images), captions_each))
    centre = unit_rows(rng, topics, 12)

    def near(kind):
        rows = centre[topic[kind]] + noise * unit_rows(rng, len(kind), 12)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    texts = [f"a t{topic[one]} w{rng.integers(6)} w{rng.integers(6)}" for one in owner]
    split = SplitInputs(near(np.arange(images)), near(owner), near(owner), texts, owner)
    return split, topic


def is_true(split, topic, caption, image):
    """Returns whether captions are true of images."""
    return topic[split.caption_image[caption]] == topic[image]


def unlabelled(split):
    """Returns the captions and the images of all unlabelled pairs."""
    caption, image = np.divmod(
        np.arange(len(split.captions) * len(split.image_emb)), len(split.image_emb)
    )
    kept = split.caption_image[caption] != image
    return caption[kept], image[kept]

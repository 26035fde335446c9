"""Made-up splits for detectors, some with planted matches: images that share a topic."""

import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.false_negatives.judged_split import JudgedSplit
from tests.support.embeddings import statistics, unit_rows
from tests.support.tiny import tiny_config


def judged_split(dataset, image_emb, text_emb, caption_bank=None, **more):
    """Returns a dataset with embeddings, as a run sees it."""
    known = {"name": "run", "step": 3, "split_name": "val", "config": tiny_config(fne__prior=0.3)}
    known |= {"stats": statistics()} | more
    ids = dataset.caption_image, dataset.image_id, dataset.caption_id
    bank = text_emb if caption_bank is None else caption_bank
    return JudgedSplit(image_emb, text_emb, *ids, **known, dataset=dataset, caption_bank=bank)


def bare_dataset(captions, owner, images):
    """Returns a dataset without images, whose ids are rows."""
    ids = np.arange(images), None, np.arange(len(captions))
    return PairDataset(captions, owner, *ids, [f"image {number}" for number in range(images)])


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
    dataset = bare_dataset(texts, owner, images)
    return judged_split(dataset, near(np.arange(images)), near(owner), near(owner)), topic


def is_true(split, topic, caption, image):
    """Returns whether captions are true of images."""
    return topic[split.caption_image[caption]] == topic[image]


def unlabelled(split):
    """Returns the captions and the images of all unlabelled pairs."""
    caption, image = np.divmod(
        np.arange(len(split.text_emb) * len(split.image_emb)), len(split.image_emb)
    )
    kept = split.caption_image[caption] != image
    return caption[kept], image[kept]

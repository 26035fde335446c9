"""A review of a made-up split, without a model."""

import numpy as np

from fne_jax.false_negatives.review_app.app import Review
from fne_jax.false_negatives.review_app.questions import Question, Questions
from fne_jax.false_negatives.verdict_store import VerdictStore
from fne_jax.model.embedded_split import EmbeddedSplit
from tests.support.embeddings import unit_rows


def some_questions(split, count=14):
    """Returns questions on pairs that are not labelled, several of a caption and of an image."""
    images = len(split.image_id)
    found = []
    for number in range(count):
        caption = number // 2
        image = int(split.caption_image[caption] + 1 + number % 2) % images
        found.append(Question(caption, image, 0.5, 0.25 + number / 100, 0.9, 0.5, -1, "run step 3"))
    return found


def some_review(path, split, reviewer="anna", count=14):
    """Returns a review; texts are embedded by their length alone."""
    rng = np.random.default_rng(0)
    embedded = EmbeddedSplit(
        unit_rows(rng, len(split.image_id), 4), unit_rows(rng, len(split.captions), 4),
        split.caption_image, split.image_id, split.caption_id,
    )  # fmt: skip

    def embed_texts(texts):
        return unit_rows(np.random.default_rng(len(texts[0])), 1, 4)

    return Review(
        title="some run",
        about="made up",
        split="train",
        dataset=split,
        questions=Questions(split, some_questions(split, count)),
        store=VerdictStore(path),
        reviewer=reviewer,
        embedded=embedded,
        embed_texts=embed_texts,
    )


def data_of(review):
    """Returns what a page of a review tells the server that it is of."""
    return f"{review.split}-{review.dataset.identity.checksum}"

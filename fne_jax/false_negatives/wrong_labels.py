"""Labelled pairs that are likely wrong: captions that were written for another image."""

from __future__ import annotations

import logging

import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.false_negatives.judged_split import JudgedSplit
from fne_jax.false_negatives.own_captions import nearest_own_caption, term_share
from fne_jax.false_negatives.suspects import LABELS, Suspects, heeded

# What the pages and the terminal say of the score.
SCORE = "by how little the caption resembles its image and the image's other captions"
_log = logging.getLogger(__name__)


def find_wrong_labels(judged: JudgedSplit, said: Pairs | None = None) -> Suspects:
    """Returns all labelled pairs of a split, the most suspect first, as `label_scores` ranks them.

    Warns where the model was trained on these labels.

    Pairs that most reviewers `said` to match are left out, and the others of theirs marked.
    """
    if judged.split_name == "train" and judged.step is not None:
        _log.warning(
            "the run was trained on the labels of this split: wrong ones that it knows by heart "
            "are not found by similarity"
        )
    score, nearest = label_scores(judged)
    order = np.argsort(-score, kind="stable")
    pairs = Pairs(order, judged.caption_image[order], judged.own_similarity[order])
    pairs = pairs.replace(score=score[order], nearest=nearest[order])
    if said is None:
        return Suspects(pairs, LABELS)
    right, wrong = (np.isin(order, said.caption[said.is_match == one]) for one in (True, False))
    return Suspects(pairs.replace(is_match=~wrong)[~right], LABELS, refuted=int(right.sum()))


def label_scores(judged: JudgedSplit) -> tuple[np.ndarray, np.ndarray]:
    """Returns how suspect each caption is of not being its image's, and what it is compared with.

    The negative mean of the similarity of caption and image, and of how near the caption comes to
    the image's other captions: the mean of its cosine to the nearest of them, by the momentum text
    encoder or an external one, and of the share of its words that they have. Each is standardised
    over the split; where an image has one caption, the second is 0.

    Returns:
      [captions] float32, the higher the more suspect; and [captions] int64, the nearest other
      caption of the same image, or -1.
    """
    caption, image = np.arange(len(judged.text_emb)), judged.caption_image
    bank = judged.caption_bank if judged.external is None else judged.external
    cosine, nearest = nearest_own_caption(bank, judged.own, caption, image)
    there = nearest >= 0
    captions = np.zeros(len(caption), np.float32)
    if there.any():
        share = term_share(judged.terms, judged.own, caption, image)
        captions[there] = (_standardised(cosine[there]) + _standardised(share[there])) / 2
    return -(_standardised(judged.own_similarity) + captions) / 2, nearest


def _standardised(values):
    return (values - values.mean()) / max(values.std(), 1e-6)


def describe(judged: JudgedSplit, found: Suspects) -> str:
    """Returns what was found, as lines for a terminal."""
    lines = [f"{judged.split_name}: {len(judged.text_emb):,} labelled pairs, ranked {SCORE}"]
    return "\n".join(filter(None, [*lines, heeded(found)]))

"""Detectors of false negatives: which unlabelled pairs of a caption and an image match in truth.

A detector judges pairs and gives each a probability and a score: the probability never falls as the
score rises, and the score tells apart what the probability does not. None but `fitted`, which has
learnt from people's verdicts, was told any match beyond the labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.errors import UserError
from fne_jax.false_negatives import own_captions
from fne_jax.false_negatives.fitted_detector import sigmoid
from fne_jax.false_negatives.judged_split import JudgedSplit
from fne_jax.false_negatives.monotone_posterior import MonotonePosterior
from fne_jax.false_negatives.pair_features import features
from fne_jax.objectives.similarity_statistics import can_suspect, false_negative_posterior

# Random unlabelled pairs, and captions of an image with its others, that calibrate a posterior.
_CALIBRATION_PAIRS = 100_000


# Takes unlabelled pairs with their similarities, and returns them with `probability`, `score` and,
# of a detector that looks at captions, `nearest`.
Judge = Callable[[Pairs], Pairs]


@dataclasses.dataclass(frozen=True)
class Detector:
    """An entry of `DETECTORS`.

    Attributes:
      description: What it goes by.
      score: What its score is.
      needs: What it needs, in words.
      missing: Takes a split, and returns why the detector cannot judge its pairs; "" if it can.
      fit: Takes a split that nothing is missing of, and returns what judges its pairs.
    """

    description: str
    score: str
    needs: str
    missing: Callable[[JudgedSplit], str]
    fit: Callable[[JudgedSplit], Judge]


def judge_by(name: str, split: JudgedSplit) -> Judge:
    """Returns what judges pairs of a split by a detector.

    Raises UserError if the detector needs what is missing.
    """
    missing = DETECTORS[name].missing(split)
    if missing:
        raise UserError(f"detector {name}: {missing}")
    return DETECTORS[name].fit(split)


def available(split: JudgedSplit) -> list[str]:
    """Returns the names of the detectors that can judge, in the order of `DETECTORS`."""
    return [name for name, detector in DETECTORS.items() if not detector.missing(split)]


def best_available(split: JudgedSplit) -> str:
    """Returns the first of `PREFERENCE` that can judge, or its last."""
    there = available(split)
    return next((name for name in PREFERENCE if name in there), PREFERENCE[-1])


def _calibrated_by_captions(
    split: JudgedSplit, score: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> Judge:
    """Returns what judges pairs by what a score says of their captions and images.

    Matches are stood for by captions and their own images, all unlabelled pairs by random ones.
    That takes for granted that a caption which nobody wrote for an image but which is true of it is
    as near to the image's captions as these are to each other; that nothing else is known of a
    pair, so that among pairs that were chosen in another way the share of matches is not what it
    says; and that the prior is right.

    Args:
      split: The split; some image has several captions, and there are several images.
      score: Takes [pairs] captions and [pairs] images, and returns [pairs] scores, the caption
        itself left out where it is one of the image's own, and the own captions that are nearest.
    """
    rng, own = np.random.default_rng(0), split.own
    caption = np.flatnonzero(own.count[split.caption_image] > 1)
    caption = rng.permutation(caption)[:_CALIBRATION_PAIRS]
    matches, _ = score(caption, split.caption_image[caption])
    caption, image = _random_unlabelled(rng, split)
    described = own.count[image] > 0
    others, _ = score(caption[described], image[described])
    posterior = MonotonePosterior.fit(matches, others, split.config.fne.prior)

    def judge(pairs: Pairs) -> Pairs:
        found, nearest = score(pairs.caption, pairs.image)
        return pairs.replace(probability=posterior(found), score=found, nearest=nearest)

    return judge


def _random_unlabelled(rng, split):
    caption = rng.integers(len(split.text_emb), size=_CALIBRATION_PAIRS)
    image = rng.integers(len(split.image_emb), size=_CALIBRATION_PAIRS)
    other = split.caption_image[caption] != image
    return caption[other], image[other]


def _gaussians(split: JudgedSplit) -> Judge:
    def judge(pairs: Pairs) -> Pairs:
        # Monotone, whatever the run trained with: a more similar pair is not a worse suspect.
        posterior = false_negative_posterior(
            jnp.asarray(pairs.similarity), split.stats, split.config.fne.prior, monotone=True
        )
        score = np.asarray(pairs.similarity, np.float32)
        return pairs.replace(probability=np.asarray(posterior), score=score)

    return judge


def _by_labelled_pairs(split: JudgedSplit) -> Judge:
    rng = np.random.default_rng(0)
    caption = rng.permutation(len(split.text_emb))[:_CALIBRATION_PAIRS]
    matches = split.similarity(caption, split.caption_image[caption])
    others = split.similarity(*_random_unlabelled(rng, split))
    posterior = MonotonePosterior.fit(matches, others, split.config.fne.prior)

    def judge(pairs: Pairs) -> Pairs:
        similarity = np.asarray(pairs.similarity, np.float32)
        return pairs.replace(probability=posterior(similarity), score=similarity)

    return judge


def _nearest(split: JudgedSplit, text_emb: np.ndarray) -> Judge:
    def score(caption: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return own_captions.nearest_own_caption(text_emb, split.own, caption, image)

    return _calibrated_by_captions(split, score)


def _captions_and_words(split: JudgedSplit) -> Judge:
    bank, own = split.caption_bank, split.own

    def score(caption: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cosine, nearest = own_captions.nearest_own_caption(bank, own, caption, image)
        share = own_captions.term_share(split.terms, own, caption, image)
        return (cosine + share) / 2, nearest

    return _calibrated_by_captions(split, score)


def _identical(split: JudgedSplit) -> Judge:
    captions = split.dataset.captions

    def judge(pairs: Pairs) -> Pairs:
        same = own_captions.identical_caption(captions, split.own, pairs.caption, pairs.image)
        found = (same >= 0).astype(np.float32)
        return pairs.replace(probability=found, score=found, nearest=same)

    return judge


def _by_verdicts(split: JudgedSplit) -> Judge:
    def judge(pairs: Pairs) -> Pairs:
        table = features(split, pairs.caption, pairs.image)
        score = split.fitted.log_odds(table).astype(np.float32)
        _, nearest = own_captions.nearest_own_caption(
            split.caption_bank, split.own, pairs.caption, pairs.image
        )
        return pairs.replace(probability=sigmoid(score), score=score, nearest=nearest)

    return judge


def _one_image(split: JudgedSplit) -> str:
    if len(split.image_emb) > 1:
        return ""
    return "there is one image: nothing could calibrate it"


def _few_statistics(split: JudgedSplit) -> str:
    least = split.config.fne.min_count
    if can_suspect(split.stats, least):
        return ""
    return (
        f"the statistics are of {split.stats.positive.count:,.0f} matching pairs, and nothing "
        f"is suspected before there are more than config.fne.min_count, {least:,}; "
        "choose a later --checkpoint, or with --embeddings a split of more pairs or a lower "
        "--config.fne.min_count"
    )


def _nothing_fitted(split: JudgedSplit) -> str:
    if split.fitted is not None:
        return ""
    return "nothing was fitted to verdicts; give --fitted, and --verdicts to fit it to"


def _not_calibratable(split: JudgedSplit) -> str:
    if 1 < len(np.unique(split.caption_image)) < len(split.caption_image):
        return ""
    return "no image has a second caption, or there is one image: nothing could calibrate it"


def _no_external(split: JudgedSplit) -> str:
    if split.external is None:
        return "there are no embeddings of another sentence encoder; give --caption-embeddings"
    return _not_calibratable(split)


DETECTORS: Mapping[str, Detector] = {
    "fitted": Detector(
        "trees fitted to people's verdicts, by all that the others go by and more: calibrated by "
        "verdicts on a random sample",
        "log odds of a match",
        "a detector that was fitted to verdicts",
        _nothing_fitted,
        _by_verdicts,
    ),
    "gaussians": Detector(
        "the posterior of the paper, by the similarity of caption and image: calibrated by the "
        "Gaussians of matching pairs and of hardest negatives",
        "cosine of caption and image",
        "similarity statistics of enough pairs",
        _few_statistics,
        _gaussians,
    ),
    "similarity": Detector(
        "the similarity of caption and image: calibrated by labelled pairs, which the model may "
        "know by heart, and random ones",
        "cosine of caption and image",
        "embeddings of images and captions",
        _one_image,
        _by_labelled_pairs,
    ),
    "captions": Detector(
        "how near the caption comes to the nearest of the image's own, by the momentum text "
        "encoder: calibrated by captions of one image, one left out, and random pairs",
        "cosine of the caption and the nearest of the image's own",
        "text embeddings, and images of several captions",
        _not_calibratable,
        lambda split: _nearest(split, split.caption_bank),
    ),
    "words": Detector(
        "as captions, and how many of the caption's words and pairs of neighbouring words are in "
        "the image's own captions, weighted by inverse document frequency: calibrated as captions",
        "mean of the cosine of captions and of the share of words",
        "text embeddings, and images of several captions",
        _not_calibratable,
        _captions_and_words,
    ),
    "identical": Detector(
        "whether the image has a caption of the same text, but for case, punctuation and spaces: "
        "1 or 0, the safe case, not calibrated",
        "1 where the texts are equal, else 0",
        "captions",
        lambda split: "",
        _identical,
    ),
    "external": Detector(
        "as captions, by the embeddings of another sentence encoder",
        "cosine of the caption and the nearest of the image's own",
        "embeddings of all captions in the split's order, and images of several captions",
        _no_external,
        lambda split: _nearest(split, split.external),
    ),
}
# What ranks if nothing is asked for: what people taught, then a sentence encoder that somebody
# chose, then the run's own, which tell hard candidates apart where similarity, by which they were
# chosen, hardly does.
PREFERENCE = ("fitted", "external", "words", "captions", "gaussians")

"""Detectors of false negatives: which unlabelled pairs of a caption and an image match in truth.

A detector judges pairs and gives each a probability and a score: the probability never falls as the
score rises, and the score tells apart what the probability does not. None but `fitted`, which has
learnt from people's verdicts, was told any match beyond the labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from fne_jax.errors import UserError
from fne_jax.false_negatives import own_captions
from fne_jax.false_negatives.fitted_detector import FittedDetector, features, sigmoid
from fne_jax.false_negatives.monotone_posterior import MonotonePosterior
from fne_jax.false_negatives.own_captions import OwnCaptions
from fne_jax.false_negatives.pair_features import SplitInputs
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    can_suspect,
    false_negative_posterior,
)

_Part = TypeVar("_Part")
# Random unlabelled pairs, and captions of an image with its others, that calibrate a posterior.
_CALIBRATION_PAIRS = 100_000


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What detectors take from a split and from a model of it.

    Attributes:
      captions: [captions] texts.
      caption_image: [captions] image of each caption.
      images: The number of images.
      prior: The share of unlabelled pairs that match, in (0, 1).
      stats: The similarity statistics of images and captions.
      min_count: How many matching pairs the statistics must have seen, at the least one more.
      caption_bank: [captions, dim] L2-normalised text embeddings by the momentum encoder, or by
        the model that gave the similarities; None where there are none.
      external: [captions, dim] L2-normalised embeddings of the captions by another sentence
        encoder, or None.
      image_emb: [images, dim] L2-normalised embeddings by the model that gave the similarities, or
        None.
      text_emb: [captions, dim] the same of the captions, or None.
      fitted: What was fitted to verdicts on pairs of such a split, or None.
    """

    captions: Sequence[str]
    caption_image: np.ndarray
    images: int
    prior: float
    stats: SimilarityStatistics
    min_count: int
    caption_bank: np.ndarray | None = None
    external: np.ndarray | None = None
    image_emb: np.ndarray | None = None
    text_emb: np.ndarray | None = None
    fitted: FittedDetector | None = None

    @property
    def calibratable(self) -> bool:
        """Whether some image has several captions, and another any."""
        return 1 < len(np.unique(self.caption_image)) < len(self.caption_image)


@dataclasses.dataclass(frozen=True)
class PairsToJudge:
    """Unlabelled pairs.

    Attributes:
      caption: [pairs] caption of each pair.
      image: [pairs] image of each pair; not the caption's own.
      similarity: [pairs] cosine of the two by the model.
    """

    caption: np.ndarray
    image: np.ndarray
    similarity: np.ndarray


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a detector finds of some pairs.

    Attributes:
      probability: [pairs] float32 that each is a match.
      score: [pairs] float32 by which they are ranked; the detector says what it is.
      evidence: [pairs] int64, the own caption of the image that the judgement rests on, or -1;
        None for a detector that looks at no captions.
    """

    probability: np.ndarray
    score: np.ndarray
    evidence: np.ndarray | None = None

    def __getitem__(self, index: slice | np.ndarray) -> Judgement:
        """Returns what is found of the pairs of a slice, a mask or an order."""
        evidence = None if self.evidence is None else self.evidence[index]
        return Judgement(self.probability[index], self.score[index], evidence)


@dataclasses.dataclass(frozen=True)
class Detector:
    """An entry of `DETECTORS`.

    Attributes:
      description: What it goes by.
      score: What its score is.
      needs: What it needs, in words.
      missing: Takes the evidence, and returns why the detector cannot judge by it; "" if it can.
      fit: Takes evidence that nothing is missing of, and returns what judges pairs.
    """

    description: str
    score: str
    needs: str
    missing: Callable[[Evidence], str]
    fit: Callable[[Evidence], Callable[[PairsToJudge], Judgement]]


def fitted(name: str, evidence: Evidence) -> Callable[[PairsToJudge], Judgement]:
    """Returns what judges pairs by a detector.

    Args:
      name: A key of `DETECTORS`.
      evidence: What is known of the split.

    Raises:
      UserError: if the detector needs what is not there.
    """
    missing = DETECTORS[name].missing(evidence)
    if missing:
        raise UserError(f"detector {name}: {missing}")
    return DETECTORS[name].fit(evidence)


def available(evidence: Evidence) -> list[str]:
    """Returns the names of the detectors that can judge, in the order of `DETECTORS`."""
    return [name for name, detector in DETECTORS.items() if not detector.missing(evidence)]


def best_available(evidence: Evidence) -> str:
    """Returns the first of `PREFERENCE` that can judge, or its last."""
    there = available(evidence)
    return next((name for name in PREFERENCE if name in there), PREFERENCE[-1])


def present(part: _Part | None) -> _Part:
    """Returns a part of the evidence that `Detector.missing` did not miss.

    Raises:
      ValueError: if it is missing all the same.
    """
    if part is None:
        raise ValueError("part: expected evidence that is there, got None; see Detector.missing")
    return part


def calibrate_by_captions(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    own: OwnCaptions,
    prior: float,
    seed: int = 0,
) -> MonotonePosterior:
    """Returns the probability of a match by what a score says of its caption and its image.

    Matches are stood for by captions and their own images, all unlabelled pairs by random ones.
    That takes for granted that a caption which nobody wrote for an image but which is true of it is
    as near to the image's captions as these are to each other; that nothing else is known of a
    pair, so that among pairs that were chosen in another way the share of matches is not what it
    says; and that the prior is right.

    Args:
      score: Takes [pairs] captions and [pairs] images, and returns [pairs] scores, the caption
        itself left out where it is one of the image's own.
      own: The captions of each image; some image has several, and there are several images.
      prior: The share of unlabelled pairs that match.
      seed: The seed of the pairs.
    """
    rng = np.random.default_rng(seed)
    captions, images = len(own.caption_image), len(own.count)
    caption = np.flatnonzero(own.count[own.caption_image] > 1)
    caption = rng.permutation(caption)[:_CALIBRATION_PAIRS]
    matches = score(caption, own.caption_image[caption])
    caption = rng.integers(captions, size=_CALIBRATION_PAIRS)
    image = rng.integers(images, size=_CALIBRATION_PAIRS)
    unlabelled = (own.caption_image[caption] != image) & (own.count[image] > 0)
    return MonotonePosterior.fit(matches, score(caption[unlabelled], image[unlabelled]), prior)


def _gaussians(evidence: Evidence) -> Callable[[PairsToJudge], Judgement]:
    def judge(pairs: PairsToJudge) -> Judgement:
        # Monotone, whatever the run trained with: a more similar pair is not a worse suspect.
        posterior = false_negative_posterior(
            jnp.asarray(pairs.similarity), evidence.stats, evidence.prior, monotone=True
        )
        return Judgement(np.asarray(posterior), np.asarray(pairs.similarity, np.float32))

    return judge


def _by_labelled_pairs(evidence: Evidence) -> Callable[[PairsToJudge], Judgement]:
    rng = np.random.default_rng(0)
    image_emb, text_emb = present(evidence.image_emb), present(evidence.text_emb)
    captions = rng.permutation(len(evidence.captions))[:_CALIBRATION_PAIRS]
    of_others = rng.integers(len(evidence.captions), size=_CALIBRATION_PAIRS)
    images = rng.integers(evidence.images, size=_CALIBRATION_PAIRS)
    unlabelled = evidence.caption_image[of_others] != images

    def cosines(caption: np.ndarray, image: np.ndarray) -> np.ndarray:
        return np.einsum("pd,pd->p", text_emb[caption], image_emb[image])

    posterior = MonotonePosterior.fit(
        cosines(captions, evidence.caption_image[captions]),
        cosines(of_others[unlabelled], images[unlabelled]),
        evidence.prior,
    )

    def judge(pairs: PairsToJudge) -> Judgement:
        similarity = np.asarray(pairs.similarity, np.float32)
        return Judgement(posterior(similarity), similarity)

    return judge


def _no_embeddings(evidence: Evidence) -> str:
    if evidence.image_emb is None or evidence.text_emb is None:
        return "there are no embeddings of images and captions"
    return "" if evidence.images > 1 else "there is one image: nothing could calibrate it"


def _few_statistics(evidence: Evidence) -> str:
    if can_suspect(evidence.stats, evidence.min_count):
        return ""
    return (
        f"the statistics are of {evidence.stats.positive.count:,.0f} matching pairs, and nothing "
        f"is suspected before there are more than config.fne.min_count, {evidence.min_count:,}; "
        "choose a later --checkpoint, or with --embeddings a split of more pairs or a lower "
        "--config.fne.min_count"
    )


def _nearest(evidence: Evidence, text_emb: np.ndarray) -> Callable[[PairsToJudge], Judgement]:
    own = OwnCaptions.of(evidence.caption_image, evidence.images)
    posterior = calibrate_by_captions(
        lambda *pairs: own_captions.nearest_own_caption(text_emb, own, *pairs)[0],
        own,
        evidence.prior,
    )

    def judge(pairs: PairsToJudge) -> Judgement:
        cosine, nearest = own_captions.nearest_own_caption(
            text_emb, own, pairs.caption, pairs.image
        )
        return Judgement(posterior(cosine), cosine, nearest)

    return judge


def _captions_and_words(evidence: Evidence) -> Callable[[PairsToJudge], Judgement]:
    own = OwnCaptions.of(evidence.caption_image, evidence.images)
    terms = own_captions.CaptionTerms.of(evidence.captions, own)
    bank = present(evidence.caption_bank)

    def score(caption: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cosine, nearest = own_captions.nearest_own_caption(bank, own, caption, image)
        share = own_captions.term_share(terms, own, caption, image)
        return (cosine + share) / 2, nearest

    posterior = calibrate_by_captions(lambda *pairs: score(*pairs)[0], own, evidence.prior)

    def judge(pairs: PairsToJudge) -> Judgement:
        mean, nearest = score(pairs.caption, pairs.image)
        return Judgement(posterior(mean), mean, nearest)

    return judge


def _identical(evidence: Evidence) -> Callable[[PairsToJudge], Judgement]:
    own = OwnCaptions.of(evidence.caption_image, evidence.images)

    def judge(pairs: PairsToJudge) -> Judgement:
        same = own_captions.identical_caption(evidence.captions, own, pairs.caption, pairs.image)
        found = (same >= 0).astype(np.float32)
        return Judgement(found, found, same)

    return judge


def _by_verdicts(evidence: Evidence) -> Callable[[PairsToJudge], Judgement]:
    detector = present(evidence.fitted)
    split = SplitInputs(
        present(evidence.image_emb),
        present(evidence.text_emb),
        present(evidence.caption_bank),
        evidence.captions,
        evidence.caption_image,
    )

    def judge(pairs: PairsToJudge) -> Judgement:
        table = features(split, pairs.caption, pairs.image)
        score = detector.log_odds(table).astype(np.float32)
        _, nearest = own_captions.nearest_own_caption(
            split.caption_bank, split.own, pairs.caption, pairs.image
        )
        return Judgement(sigmoid(score), score, nearest)

    return judge


def _nothing_fitted(evidence: Evidence) -> str:
    if evidence.fitted is None:
        return "nothing was fitted to verdicts; give --fitted, and --verdicts to fit it to"
    parts = evidence.image_emb, evidence.text_emb, evidence.caption_bank
    if any(part is None for part in parts):
        return "there are no embeddings of images and captions"
    return ""


def _not_calibratable(evidence: Evidence) -> str:
    if evidence.calibratable:
        return ""
    return "no image has a second caption, or there is one image: nothing could calibrate it"


def _no_bank(evidence: Evidence) -> str:
    return (
        "there are no text embeddings"
        if evidence.caption_bank is None
        else _not_calibratable(evidence)
    )


def _no_external(evidence: Evidence) -> str:
    if evidence.external is None:
        return "there are no embeddings of another sentence encoder; give --caption-embeddings"
    return _not_calibratable(evidence)


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
        _no_embeddings,
        _by_labelled_pairs,
    ),
    "captions": Detector(
        "how near the caption comes to the nearest of the image's own, by the momentum text "
        "encoder: calibrated by captions of one image, one left out, and random pairs",
        "cosine of the caption and the nearest of the image's own",
        "text embeddings, and images of several captions",
        _no_bank,
        lambda evidence: _nearest(evidence, present(evidence.caption_bank)),
    ),
    "words": Detector(
        "as captions, and how many of the caption's words and pairs of neighbouring words are in "
        "the image's own captions, weighted by inverse document frequency: calibrated as captions",
        "mean of the cosine of captions and of the share of words",
        "text embeddings, and images of several captions",
        _no_bank,
        _captions_and_words,
    ),
    "identical": Detector(
        "whether the image has a caption of the same text, but for case, punctuation and spaces: "
        "1 or 0, the safe case, not calibrated",
        "1 where the texts are equal, else 0",
        "captions",
        lambda evidence: "",
        _identical,
    ),
    "external": Detector(
        "as captions, by the embeddings of another sentence encoder",
        "cosine of the caption and the nearest of the image's own",
        "embeddings of all captions in the split's order, and images of several captions",
        _no_external,
        lambda evidence: _nearest(evidence, present(evidence.external)),
    ),
}
# What ranks if nothing is asked for: what people taught, then a sentence encoder that somebody
# chose, then the run's own, which tell hard candidates apart where similarity, by which they were
# chosen, hardly does.
PREFERENCE = ("fitted", "external", "words", "captions", "gaussians")

"""Detectors judge pairs as slow plain versions of them do, and say what they lack."""

import dataclasses
import doctest
import itertools
import re

import numpy as np
import pytest

from fne_jax.data.pair_columns import Pairs
from fne_jax.errors import UserError
from fne_jax.false_negatives import detectors, monotone_posterior, own_captions
from fne_jax.false_negatives.detectors import DETECTORS, judge_by
from fne_jax.false_negatives.fitted_detector import fit
from fne_jax.false_negatives.monotone_posterior import MonotonePosterior
from fne_jax.false_negatives.own_captions import CaptionTerms, OwnCaptions
from fne_jax.false_negatives.pair_features import features
from fne_jax.false_negatives.verdict_samples import sample
from fne_jax.objectives.similarity_statistics import false_negative_posterior
from tests.support.embeddings import statistics, unit_rows
from tests.support.planted import (
    bare_dataset,
    is_true,
    judged_split,
    planted_split,
    unlabelled,
)
from tests.support.tiny import tiny_config

# Image 3 has one caption; the captions of an image do not stand together.
OWNER = np.array([2, 0, 1, 0, 2, 1, 3, 0, 2])
CAPTIONS = [
    "A red dog!", "a blue cat", "two  dogs", "a cat, blue", "the red dog runs", "dogs",
    "A RED DOG", "...", "---",
]  # fmt: skip


def all_pairs():
    caption, image = np.divmod(np.arange(9 * 4), 4)
    return caption, image


def some_split(captions=CAPTIONS, owner=OWNER, images=4, **changes):
    rng = np.random.default_rng(0)
    emb = unit_rows(rng, images, 5), unit_rows(rng, len(captions), 5)
    config = tiny_config(fne__prior=0.1, fne__min_count=200)
    return judged_split(bare_dataset(captions, owner, images), *emb, **{"config": config} | changes)


def own_of(caption, image):
    return [other for other in np.flatnonzero(image == OWNER) if other != caption]


def test_the_nearest_own_caption_against_a_plain_version(monkeypatch):
    monkeypatch.setattr(own_captions, "_BLOCK_PAIRS", 5)
    emb, (caption, image) = some_split().caption_bank, all_pairs()
    cosine, nearest = own_captions.nearest_own_caption(
        emb, OwnCaptions.of(OWNER, 4), caption, image
    )
    lonely = 0
    for c, i, found, row in zip(caption, image, cosine, nearest, strict=True):
        others = {other: emb[c] @ emb[other] for other in own_of(c, i)}
        lonely += not others
        expected = max(others, key=others.get) if others else -1
        assert row == expected
        assert found == pytest.approx(others.get(expected, -1.0), abs=1e-6)
    assert lonely == 1  # caption 6 is all that image 3 has


def test_the_share_of_terms_against_a_plain_version(monkeypatch):
    monkeypatch.setattr(own_captions, "_BLOCK_PAIRS", 5)
    own, (caption, image) = OwnCaptions.of(OWNER, 4), all_pairs()
    share = own_captions.term_share(CaptionTerms.of(CAPTIONS, own), own, caption, image)
    words = [re.findall(r"[a-z]+", text.lower()) for text in CAPTIONS]
    texts = [set(text) | set(itertools.pairwise(text)) for text in words]
    weight = {word: np.log(10 / sum(word in text for text in texts)) for word in set.union(*texts)}
    for c, i, found in zip(caption, image, share, strict=True):
        there = set().union(*(texts[other] for other in own_of(c, i)))
        total = sum(weight[word] for word in texts[c])
        expected = sum(weight[word] for word in texts[c] & there) / total if total else 0.0
        assert found == pytest.approx(expected, abs=1e-6)
    assert 0 < np.count_nonzero((share > 0) & (share < 1)) < len(share)


def test_texts_that_say_the_same():
    caption, image = all_pairs()
    judged = judge_by("identical", some_split())(Pairs(caption, image))
    same = {(c, i) for c, i, p in zip(caption, image, judged.probability, strict=True) if p == 1}
    # "A red dog!" and "A RED DOG"; texts without a word equal none.
    assert same == {(0, 3), (6, 2)} and set(judged.probability) == {0, 1}
    rows = judged.probability == 1
    np.testing.assert_array_equal(judged.nearest[rows], [6, 0])
    assert (judged.nearest[~rows] == -1).all()
    assert own_captions.normalised(" Été,\tÀ-la_plage!  3") == "été à la plage 3"


def test_gaussians_are_the_posterior_of_the_paper():
    similarity = np.array([-0.9, 0.4, 0.8], np.float32)
    pairs = Pairs(np.arange(3), np.array([1, 1, 0]), similarity)
    judged = judge_by("gaussians", some_split(config=tiny_config(fne__prior=0.3)))(pairs)
    expected = false_negative_posterior(pairs.similarity, statistics(), 0.3, monotone=True)
    np.testing.assert_array_equal(judged.probability, expected)
    np.testing.assert_array_equal(judged.score, pairs.similarity)


def test_the_posterior_of_samples_is_bayes_rule():
    rng = np.random.default_rng(0)
    matches = rng.normal(2, 1, 40_000)
    everything = np.where(
        rng.random(80_000) < 0.1, rng.normal(2, 1, 80_000), rng.normal(size=80_000)
    )
    posterior = MonotonePosterior.fit(matches, everything, prior=0.1)
    score = np.linspace(-0.5, 3.0, 15)
    density = np.exp(-((score - [[0], [2]]) ** 2) / 2) * [[0.9], [0.1]]
    np.testing.assert_allclose(posterior(score), density[1] / density.sum(axis=0), atol=0.06)
    assert (np.diff(posterior(np.linspace(-9, 9, 1000))) >= 0).all()
    # Above the largest score of few samples, nothing is certain.
    few = MonotonePosterior.fit(np.array([0.9]), np.array([0.1, 0.2]), prior=0.1)
    assert 0 < few(np.array([5.0]))[0] < 1
    with pytest.raises(ValueError, match="all_pairs: expected finite"):
        MonotonePosterior.fit(matches, np.array([np.nan]), prior=0.1)


@pytest.mark.parametrize("name", ["captions", "external", "words"])
def test_detectors_by_captions_find_planted_matches(name):
    """Captions of a topic each; some images share one, which nobody labelled."""
    rng = np.random.default_rng(1)
    topic = np.arange(300) // 2  # the topic of each image: two images have the same
    owner = np.repeat(np.arange(300), 3)
    emb = unit_rows(rng, 150, 16)[topic[owner]] + 0.4 * unit_rows(rng, 900, 16)
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    texts = [f"a t{topic[image]} w{rng.integers(9)}" for image in owner]
    bank = {"external": emb} if name == "external" else {"caption_bank": emb}
    of_split = some_split(texts, owner, 300, config=tiny_config(fne__prior=1 / 299), **bank)
    caption = rng.integers(900, size=4000)
    image = rng.integers(300, size=4000)
    image[:2000] = owner[caption[:2000]] ^ 1  # the other of the topic
    kept = owner[caption] != image
    caption, image = caption[kept], image[kept]
    truth = topic[owner[caption]] == topic[image]
    judged = judge_by(name, of_split)(Pairs(caption, image))
    assert judged.probability[truth].mean() > 0.5 and judged.probability[~truth].mean() < 0.02
    assert ((judged.probability >= 0) & (judged.probability <= 1)).all()
    rising = np.argsort(judged.score)
    assert (np.diff(judged.probability[rising]) >= 0).all()
    np.testing.assert_array_equal(owner[judged.nearest], image)


def test_similarity_is_calibrated_by_labelled_pairs():
    # Captions of 20 topics; images of one topic look alike, and a prior of 1 / 20 is right.
    rng = np.random.default_rng(0)
    topic = rng.integers(20, size=3000)
    owner = np.arange(3000)
    centre = unit_rows(rng, 20, 8)

    def near_the_topic():
        emb = centre[topic] + 0.25 * rng.normal(size=(3000, 8)).astype(np.float32)
        return emb / np.linalg.norm(emb, axis=1, keepdims=True)

    images, texts = near_the_topic(), near_the_topic()
    dataset = bare_dataset(["a"] * 3000, owner, 3000)
    of_split = judged_split(dataset, images, texts, config=tiny_config(fne__prior=0.05))
    caption, image = rng.integers(3000, size=(2, 200_000))
    caption, image = caption[caption != image], image[caption != image]
    similarity = (texts[caption] * images[image]).sum(axis=1)
    judged = judge_by("similarity", of_split)(Pairs(caption, image, similarity))
    truth = topic[caption] == topic[image]
    np.testing.assert_array_equal(judged.score, similarity)
    for low, high in ((0.0, 0.05), (0.3, 0.6), (0.6, 0.9)):
        some = (judged.probability >= low) & (judged.probability < high)
        assert some.sum() > 300
        assert truth[some].mean() == pytest.approx(judged.probability[some].mean(), abs=0.08)


def test_the_fitted_detector_judges_by_the_features_of_pairs():
    split, topic = planted_split(90, 3, topics=15, noise=0.8)
    drawn = sample(split, 300, 0)
    said = is_true(split, topic, drawn.caption, drawn.image)
    detector = fit(features(split, drawn.caption, drawn.image), said, drawn.weight, 0)
    of_split = dataclasses.replace(split, fitted=detector)
    caption, image = unlabelled(split)
    judged = judge_by("fitted", of_split)(Pairs(caption, image, split.similarity(caption, image)))
    expected = detector.probability(features(split, caption, image))
    np.testing.assert_allclose(judged.probability, expected, atol=1e-6)
    rising = np.argsort(judged.score)
    assert (np.diff(judged.probability[rising]) >= 0).all()
    np.testing.assert_array_equal(split.caption_image[judged.nearest], image)
    truth = is_true(split, topic, caption, image)
    assert judged.probability[truth].mean() > judged.probability[~truth].mean() + 0.5


def test_what_can_judge_and_what_is_preferred():
    everything = some_split(external=unit_rows(np.random.default_rng(1), 9, 3))
    table, said = np.random.default_rng(3).random((80, 11)), np.arange(80) % 2 == 0
    taught = dataclasses.replace(everything, fitted=fit(table, said, np.ones(80), 0))
    assert detectors.available(taught) == list(DETECTORS)
    assert detectors.best_available(taught) == "fitted"
    assert detectors.available(everything) == [name for name in DETECTORS if name != "fitted"]
    assert detectors.best_available(everything) == "external"
    assert detectors.best_available(some_split()) == "words"
    single = some_split(CAPTIONS[:4], np.arange(4), external=unit_rows(np.random.default_rng(1), 4))
    assert detectors.available(single) == ["gaussians", "similarity", "identical"]
    assert detectors.best_available(single) == "gaussians"
    one_image = some_split(owner=np.zeros(9, int), images=1)
    assert detectors.available(one_image) == ["gaussians", "identical"]
    assert detectors.best_available(one_image) == "gaussians"
    for name, of_split, message in (
        ("external", some_split(), "give --caption-embeddings"),
        ("fitted", everything, "nothing was fitted to verdicts; give --fitted"),
        ("similarity", one_image, "there is one image"),
        ("words", single, "no image has a second caption"),
        (
            "gaussians",
            some_split(stats=statistics(count=200)),
            "more than config.fne.min_count, 200",
        ),
    ):
        with pytest.raises(UserError, match=f"detector {name}: .*{message}"):
            judge_by(name, of_split)


def test_the_example_of_the_posterior_runs():
    result = doctest.testmod(monotone_posterior)
    assert result.attempted and not result.failed

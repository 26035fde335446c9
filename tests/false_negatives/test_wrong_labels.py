"""Captions that were given to the wrong image are found among the labelled pairs."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from fne_jax.data.pair_columns import Pairs
from fne_jax.false_negatives import audit_pages, wrong_labels
from fne_jax.false_negatives.review_app.question_sources import questions_of_suspects
from tests.support.embeddings import unit_rows
from tests.support.pages import Page, assert_safe_and_complete, hostile_split
from tests.support.planted import bare_dataset, judged_split, planted_split


def test_scores_against_a_plain_version():
    rng, images = np.random.default_rng(0), 5
    owner = rng.permutation(np.repeat(np.arange(images), [1, 2, 3, 1, 4]))
    captions = len(owner)
    image_emb, text_emb, bank = (unit_rows(rng, rows, 6) for rows in (images, captions, captions))
    texts = [" ".join(f"w{number}" for number in rng.integers(6, size=4)) for _ in owner]
    split = judged_split(bare_dataset(texts, owner, images), image_emb, text_emb, bank)
    score, nearest = wrong_labels.label_scores(split)

    def terms(text):
        words = text.split()
        return {*words, *itertools.pairwise(words)}

    everywhere = [term for text in texts for term in terms(text)]
    weight = {term: math.log((1 + captions) / everywhere.count(term)) for term in everywhere}
    similarity = [text_emb[row] @ image_emb[owner[row]] for row in range(captions)]
    cosine, share = {}, {}
    for row, image in enumerate(owner):
        others = [one for one in range(captions) if owner[one] == image and one != row]
        assert nearest[row] == max(others, key=lambda one: bank[row] @ bank[one], default=-1)
        if others:
            cosine[row] = max(bank[row] @ bank[one] for one in others)
            found = terms(texts[row]) & set().union(*(terms(texts[one]) for one in others))
            share[row] = sum(weight[one] for one in found) / sum(
                weight[one] for one in terms(texts[row])
            )

    def standardised(value, values):
        return (value - np.mean(values)) / np.std(values)

    for row in range(captions):
        told = standardised(similarity[row], similarity)
        if row in cosine:
            parts = (cosine, share)
            told += sum(standardised(one[row], list(one.values())) for one in parts) / 2
        assert score[row] == pytest.approx(-told / 2, abs=1e-4)


def test_swapped_captions_come_first_and_verdicts_are_heeded(tmp_path):
    split, _ = planted_split(60, 3, topics=60, noise=0.7)
    # Every topic has one image: the captions of five images go to the next of the five.
    owner = split.caption_image.copy()
    swapped = np.array([np.flatnonzero(owner == image)[0] for image in range(5)])
    owner[swapped] = np.roll(owner[swapped], 1)
    dataset = dataclasses.replace(hostile_split(60), captions=split.dataset.captions)
    dataset = dataclasses.replace(dataset, caption_image=owner, caption_id=np.arange(180))
    split = judged_split(dataset, split.image_emb, split.text_emb, split.caption_bank)
    found = wrong_labels.find_wrong_labels(split)
    assert len(found.pairs) == 180 and set(found.pairs.caption[:5]) == set(swapped.tolist())
    np.testing.assert_array_equal(found.pairs.image, owner[found.pairs.caption])
    first, second = found.pairs.rows()[:2]
    said = Pairs(*np.array([first, second]).T).replace(is_match=np.array([True, False]))
    heeded = wrong_labels.find_wrong_labels(split, said)
    assert heeded.pairs.rows() == found.pairs.rows()[1:]
    told = "1 pairs that reviewers confirmed are left out, 1 that they refuted are in"
    assert told in wrong_labels.describe(split, heeded)

    audit_pages.write_audit(tmp_path, split, heeded, limit=10, quality={})
    lines = (tmp_path / audit_pages.LABEL_NAMES[1]).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["caption_index"], row["image_index"]) for row in rows] == heeded.pairs.rows()[:10]
    assert [row["confirmed"] for row in rows] == [True] + 9 * [False]
    page = Page((tmp_path / "index.html").read_text())
    assert_safe_and_complete(page)
    shown = " ".join(page.text)
    assert told in shown and shown.count("reviewers say it does not match") == 1
    # No image is shown beside the one that the caption is given to.
    assert len(page.tags["img"]) == len(page.tags["section"])

    questions = questions_of_suspects(split, found, 4)
    assert [(one.caption, one.image) for one in questions] == found.pairs.rows()[:4]
    assert all(one.lead is one.probability is None for one in questions)

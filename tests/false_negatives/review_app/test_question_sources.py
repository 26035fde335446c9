"""Questions hold what their verdicts are to tell, and a detector is fitted to their answers."""

import dataclasses

import numpy as np
import pytest

from fne_jax.data.verdicts import MATCH, NO_MATCH, Verdict
from fne_jax.false_negatives.review_app.question_sources import (
    questions_of_sample,
    questions_of_suspects,
)
from fne_jax.false_negatives.suspects import find_suspects
from fne_jax.false_negatives.verdict_fitting import fit_detector, said_of
from tests.support.embeddings import unit_rows
from tests.support.pages import hostile_split
from tests.support.planted import is_true, judged_split, planted_split


def test_questions_of_suspects():
    dataset, rng = hostile_split(images=15), np.random.default_rng(0)
    emb = unit_rows(rng, 15, 4), unit_rows(rng, 30, 4), unit_rows(rng, 30, 4)
    split = judged_split(dataset, *emb)
    found = find_suspects(split, per_query=3, least=0.0)
    questions = questions_of_suspects(split, found, 20)
    assert [(one.caption, one.image) for one in questions] == found.pairs.rows()[:20]
    for index, question in enumerate(questions):
        own, text = dataset.caption_image[question.caption], split.text_emb[question.caption]
        lead = text @ split.image_emb[question.image] - text @ split.image_emb[own]
        assert question.lead == pytest.approx(lead, abs=1e-6)
        assert question.probability == pytest.approx(found.pairs.probability[index])
        assert dataset.caption_image[question.nearest] == question.image
        assert (question.model, question.sample) == ("run step 3", "")


def test_questions_of_a_sample_and_what_is_learnt_from_the_answers():
    split, topic = planted_split(80, 3, topics=12, noise=0.8)
    captions = split.dataset.captions
    ids = {"image_id": np.arange(80) + 500, "caption_id": np.arange(240) + 1000}
    split = dataclasses.replace(split, dataset=dataclasses.replace(split.dataset, **ids), **ids)
    asked = questions_of_sample(split, 300, seed=0)
    assert len({(one.caption, one.image) for one in asked}) == 300
    assert all(one.similarity is one.probability is None and one.weight >= 1 for one in asked)
    assert {one.sample for one in asked} == {"run step 3, 300 pairs, seed 0"}

    said = is_true(split, topic, *np.array([(one.caption, one.image) for one in asked]).T)
    verdicts = [
        Verdict("val", 500 + one.image, 1000 + one.caption, "", captions[one.caption],
                MATCH if word else NO_MATCH, "ann", "", one.model, None, one.sample, one.weight)
        for one, word in zip(asked, said, strict=True)
    ]  # fmt: skip
    # What evaluates systems has labelled pairs too, which say nothing of unlabelled ones.
    labelled = dataclasses.replace(verdicts[0], image_id=500 + int(split.caption_image[0]))
    labelled = dataclasses.replace(labelled, caption_id=1000, caption=captions[0])
    about = fit_detector(split, said_of(split, [*verdicts, labelled])).about
    assert about["verdicts"] == 300 and about["matches"] == said.sum()
    found, caption = about["density"], np.arange(240)
    true = np.mean([is_true(split, topic, caption, np.full(240, image)) for image in range(80)])
    assert found["low"] < true < found["high"] and found["high"] < 3 * true

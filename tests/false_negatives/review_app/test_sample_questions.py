"""The questions of a random sample, and that their answers are what a detector is fitted to."""

import dataclasses

import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.data.verdicts import MATCH, NO_MATCH, Verdict
from fne_jax.false_negatives.review_app.sample_questions import questions_of_sample
from fne_jax.false_negatives.suspects import JudgedSplit
from fne_jax.false_negatives.verdict_fitting import fit_detector, said_of
from fne_jax.model.embedded_split import EmbeddedSplit
from tests.support.embeddings import statistics
from tests.support.planted import is_true, planted_split
from tests.support.tiny import tiny_config


def test_questions_of_a_sample_and_what_is_learnt_from_the_answers():
    split, topic = planted_split(80, 3, topics=12, noise=0.8)
    ids = np.arange(80, dtype=np.int32) + 500, np.arange(240) + 1000
    names = [f"image {number}" for number in range(80)]
    dataset = PairDataset(split.captions, split.caption_image, ids[0], None, ids[1], names)
    embedded = EmbeddedSplit(split.image_emb, split.text_emb, split.caption_image, *ids)
    judged = JudgedSplit(
        "run", 780, "train", tiny_config(), dataset, embedded, statistics(), split.caption_bank
    )
    asked = questions_of_sample(judged, 300, seed=0)
    assert len({(one.caption, one.image) for one in asked}) == 300
    assert all(one.similarity is one.probability is None and one.weight >= 1 for one in asked)
    assert {one.sample for one in asked} == {"run step 780, 300 pairs, seed 0"}

    said = is_true(split, topic, *np.array([(one.caption, one.image) for one in asked]).T)
    verdicts = [
        Verdict("train", 500 + one.image, 1000 + one.caption, "", split.captions[one.caption],
                MATCH if word else NO_MATCH, "ann", "", one.model, None, one.sample, one.weight)
        for one, word in zip(asked, said, strict=True)
    ]  # fmt: skip
    # What evaluates systems has labelled pairs too, which say nothing of unlabelled ones.
    labelled = dataclasses.replace(verdicts[0], image_id=500 + int(split.caption_image[0]))
    labelled = dataclasses.replace(labelled, caption_id=1000, caption=split.captions[0])
    about = fit_detector(judged, said_of(judged, [*verdicts, labelled])).about
    assert about["verdicts"] == 300 and about["matches"] == said.sum()
    found, caption = about["density"], np.arange(240)
    true = np.mean([is_true(split, topic, caption, np.full(240, image)) for image in range(80)])
    assert found["low"] < true < found["high"] and found["high"] < 3 * true

"""A run's questions hold what its verdicts are to tell."""

import numpy as np
import pytest

from fne_jax.false_negatives import suspects
from fne_jax.false_negatives.review_app.suspect_questions import questions_of
from fne_jax.model.embedded_split import EmbeddedSplit
from tests.support.embeddings import statistics, unit_rows
from tests.support.pages import hostile_split
from tests.support.tiny import tiny_config


@pytest.fixture
def judged():
    split, rng = hostile_split(images=15), np.random.default_rng(0)
    rows = unit_rows(rng, 15, 4), unit_rows(rng, 30, 4)
    ids = split.caption_image, split.image_id, split.caption_id
    embedded = EmbeddedSplit(*rows, *ids)
    config = tiny_config(fne__prior=0.3)
    return suspects.JudgedSplit(
        "run", 3, "val", config, split, embedded, statistics(), unit_rows(rng, 30, 4)
    )


def test_suspects(judged):
    found = suspects.find_suspects(judged, per_query=3, rank_by="probability", least=0.0)
    questions = questions_of(judged, found, 20)
    assert len(questions) == 20
    for index, question in enumerate(questions):
        assert (question.caption, question.image) == (
            found.pairs.caption[index], found.pairs.image[index],
        )  # fmt: skip
        own = judged.dataset.caption_image[question.caption]
        text, images = judged.embedded.text_emb[question.caption], judged.embedded.image_emb
        lead = text @ images[question.image] - text @ images[own]
        assert question.lead == pytest.approx(lead, abs=1e-6)
        assert question.probability == pytest.approx(found.judgement.probability[index])
        assert judged.dataset.caption_image[question.nearest] == question.image
        assert (question.model, question.sample) == ("run step 3", "")

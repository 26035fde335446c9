import numpy as np
import pytest

from fne_jax.false_negatives import likely_matches as likely_lib
from fne_jax.false_negatives.likely_matches import likely_matches
from tests.support.embeddings import unit_rows
from tests.support.planted import bare_dataset, judged_split


@pytest.mark.parametrize("per_caption", [1, 3, 50])
def test_equals_a_plain_search(monkeypatch, per_caption):
    monkeypatch.setattr(likely_lib, "_CAPTIONS", 5)
    rng = np.random.default_rng(0)
    images, dim = 7, 5
    caption_image = np.array([3, 0, 0, 2, 6, 3, 3, 1, 5, 6, 0, 5])  # none of image 4
    image_emb = unit_rows(rng, images, dim)
    text_emb, bank = unit_rows(rng, 12, dim), unit_rows(rng, 12, 3)
    chance = rng.random((12, images)).astype(np.float32)

    def judge(pairs):
        expected = (text_emb[pairs.caption] * image_emb[pairs.image]).sum(axis=1)
        np.testing.assert_allclose(pairs.similarity, expected, atol=1e-6)
        assert (caption_image[pairs.caption] != pairs.image).all()
        probability = chance[pairs.caption, pairs.image]
        return pairs.replace(probability=probability, score=probability)

    dataset = bare_dataset(["a"] * 12, caption_image, images)
    split = judged_split(dataset, image_emb, text_emb, bank)
    found = likely_matches(split, judge, per_caption=per_caption, least=0.4)
    expected = {}
    for caption in range(12):
        of_images = [np.flatnonzero(caption_image == image) for image in range(images)]
        nearest = [max(bank[own] @ bank[caption], default=-9) for own in of_images]
        for score in (image_emb @ text_emb[caption], np.array(nearest)):
            for image in np.argsort(-score)[:per_caption]:
                if image != caption_image[caption] and chance[caption, image] >= 0.4:
                    expected[caption, image] = chance[caption, image]
    assert len(expected) > 3
    pairs = zip(found.caption, found.image, strict=True)
    assert dict(zip(pairs, found.probability, strict=True)) == expected

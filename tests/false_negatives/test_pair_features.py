"""The features of a pair are what a slow plain version of them says."""

import itertools
import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fne_jax.false_negatives import judged_split as judged_lib
from fne_jax.false_negatives import own_captions, pair_features
from fne_jax.false_negatives.fitted_detector import FEATURES
from fne_jax.false_negatives.pair_features import features
from tests.support.embeddings import unit_rows
from tests.support.planted import bare_dataset, judged_split, unlabelled

OWNER = np.array([2, 0, 1, 0, 2, 1, 3, 0, 2])
CAPTIONS = [
    "A red dog!", "a blue cat", "two  dogs", "a cat, blue", "the red dog runs, blue", "dogs",
    "A RED DOG", "red", "---",
]  # fmt: skip


def split():
    rng = np.random.default_rng(0)
    embeddings = unit_rows(rng, 4, 5), unit_rows(rng, 9, 5), unit_rows(rng, 9, 7)
    return judged_split(bare_dataset(CAPTIONS, OWNER, 4), *embeddings)


def plainly(of, caption, image):
    similarity = of.text_emb @ of.image_emb.T
    words = [own_captions.normalised(text).split() for text in CAPTIONS]
    terms = [set(text) | set(itertools.pairwise(text)) for text in words]
    weight = {term: np.log(10 / sum(term in one for one in terms)) for term in set.union(*terms)}

    def mass(these):
        return sum(weight[term] for term in these)

    ours, theirs = terms[caption], [terms[other] for other in np.flatnonzero(image == OWNER)]
    total, found = mass(ours), mass(ours & set().union(*theirs))
    s, row, column = similarity[caption, image], similarity[caption], similarity[:, image]
    own = [other for other in range(9) if OWNER[other] == image]
    return {
        "similarity": s,
        "lead": s - row[OWNER[caption]],
        "lead_of_image": s - max(column[other] for other in own),
        "rank_of_image": (s - row.mean()) / row.std(),
        "rank_of_caption": (s - column.mean()) / column.std(),
        "nearest_caption": max(of.caption_bank[caption] @ of.caption_bank[other] for other in own),
        "image_similarity": of.image_emb[image] @ of.image_emb[OWNER[caption]],
        "words_found": found / total if total else 0,
        "words_in_one": max(mass(ours & one) for one in theirs) / total if total else 0,
        "words_missing": total - found,
        "words": len(ours),
    }


def test_features_against_a_plain_version(monkeypatch):
    monkeypatch.setattr(pair_features, "_BLOCK_PAIRS", 5)
    monkeypatch.setattr(judged_lib, "_BLOCK_ROWS", 2)
    monkeypatch.setattr(own_captions, "_BLOCK_PAIRS", 3)
    of = split()
    caption, image = (rows[::-1] for rows in unlabelled(of))
    found = features(of, caption, image)
    assert found.shape == (27, len(FEATURES)) and found.dtype == np.float32
    expected = [list(plainly(of, *pair).values()) for pair in zip(caption, image, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert list(plainly(of, 0, 0)) == list(FEATURES)
    # What differs between one caption and all of them is seen.
    columns = dict(zip(FEATURES, found.T, strict=True))
    assert (columns["words_in_one"] < columns["words_found"]).any()


def test_ranks_are_told_by_a_sample_of_the_others(monkeypatch):
    monkeypatch.setattr(judged_lib, "_OTHERS", 3)
    of = split()
    mean, deviation = of.to_random_captions
    similarity = of.image_emb @ of.text_emb.T
    drawn = [
        three
        for three in itertools.combinations(range(9), 3)
        if np.allclose(similarity[:, three].mean(axis=1), mean, atol=1e-6)
    ]
    assert len(drawn) == 1
    np.testing.assert_allclose(similarity[:, drawn[0]].std(axis=1), deviation, atol=1e-6)


def test_captions_without_words_and_pairs_that_are_labelled():
    emb = unit_rows(np.random.default_rng(0), 3, 2, 5)
    wordless = judged_split(bare_dataset(["?", "!"], np.arange(2), 2), *emb)
    found = dict(zip(FEATURES, features(wordless, np.array([0]), np.array([1])).T, strict=True))
    assert all(found[name] == 0 for name in FEATURES if name.startswith("words"))
    with pytest.raises(ValueError, match="1 pairs are of a caption and its own image"):
        features(split(), np.array([0, 1]), np.array([1, 0]))


def test_the_hardest_pairs_of_either_side(monkeypatch):
    monkeypatch.setattr(judged_lib, "HARDEST", 2)
    of = split()
    similarity = of.text_emb @ of.image_emb.T
    similarity[np.arange(9), OWNER] = -np.inf
    expected = {(c, i) for c in range(9) for i in np.argsort(-similarity[c])[:2]}
    expected |= {(c, i) for i in range(4) for c in np.argsort(-similarity[:, i])[:2]}
    assert {divmod(int(pair), 4) for pair in of.hardest} == expected
    assert of.unlabelled == 27


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (
            "\u0932\u0921\u093c\u0915\u093e",
            "\u0932\u0921\u093c\u0915\u0940",
            False,
        ),  # Hindi: boy, girl
        ("\u0e01\u0e32", "\u0e01\u0e49\u0e32", False),  # Thai, with and without a tone
        ("caf\u00e9", "CAFE\u0301", True),
        ("cafe", "caf\u00e9", False),
        ("a dog \U0001f436", "a dog \U0001f431", False),
        ("\U0001f44d\U0001f3fb", "\U0001f44d\U0001f3ff", False),
        ("\u2764\ufe0f", "\u2764", True),
        ("\u0645\u06cc\u200c\u0631\u0648\u062f", "\u0645\u06cc\u0631\u0648\u062f", True),
        ("Stra\u00dfe_1 \u2014 `a`", "strasse 1... A", True),
        ("\u3002\u3001 ?!", "", True),
    ],
)
def test_letters_of_any_script_count_with_their_marks(one, other, same):
    assert (own_captions.normalised(one) == own_captions.normalised(other)) == same


@hypothesis.given(st.text())
@hypothesis.settings(derandomize=True, deadline=None)
def test_a_normalised_text_stays_as_it_is_in_any_form(text):
    found = own_captions.normalised(text)
    assert found == " ".join(found.split())
    for form in ("NFC", "NFD"):
        assert own_captions.normalised(unicodedata.normalize(form, text)) == found

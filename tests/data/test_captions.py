"""Cleaning as the authors do it, and tokenizers that every process numbers alike."""

import hashlib
import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from fne_jax.data import captions
from fne_jax.errors import UserError

FIT = """
import hashlib, json, sys
from fne_jax.data.captions import fit_tokenizer, tokenize
for texts in json.loads(sys.stdin.read()):
    ids, mask = tokenize(fit_tokenizer(texts, 80), texts, 12)
    print(hashlib.sha256(ids.tobytes() + mask.tobytes()).hexdigest())
"""
TEXTS = [
    f"a {a} {b} near the {c}"
    for a in ("red", "redder", "blue")
    for b in ("dog", "dogs", "doge")
    for c in ("house", "hose", "houses", "horse")
]
# All words alike frequent, so that most merges of letters tie.
TIED = ["circle square triangle hexagon crescent diamond purple orange yellow magenta small large"]


def test_cleaning_is_the_authors(golden):
    for case in json.loads((golden / "captions.json").read_text()):
        assert captions.clean_caption(case["raw"], case["max_words"]) == case["clean"]


def fitted_digest(texts):
    ids, mask = captions.tokenize(captions.fit_tokenizer(texts, 80), texts, 12)
    return hashlib.sha256(ids.tobytes() + mask.tobytes()).hexdigest()


def test_fitted_ids_are_the_same_at_every_fit_and_in_every_process():
    here = []
    for texts in (TEXTS, TIED):
        # The trainer numbers ties anew at each fit, within a process as well.
        (digest,) = {fitted_digest(texts) for _ in range(8)}
        here.append(digest)
    there = subprocess.run(
        [sys.executable, "-c", FIT],
        input=json.dumps([TEXTS, TIED]), text=True, capture_output=True,
    )  # fmt: skip
    assert there.stdout.split() == here, there.stderr


def test_fitted_tokenizer_tells_captions_apart_and_pads():
    tokenizer = captions.fit_tokenizer(TEXTS, 80)
    ids, mask = captions.tokenize(tokenizer, TEXTS, 12)
    assert ids.shape == mask.shape == (len(TEXTS), 12)
    assert ids.dtype == mask.dtype == np.int32
    assert len({row.tobytes() for row in ids}) == len(TEXTS)
    assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    assert (ids[:, 0] == tokenizer.cls_token_id).all()


# Two captions that differ in a mark, an accent or a vowel sign alone.
OF_SCRIPTS = {
    "Japanese": ("ガラス の 皿", "カラス の 皿"),
    "Hindi": ("एक लाल फूल", "एक लाल फल"),
    "Bengali": ("বালক কুল", "বালক কল"),
    "Vietnamese": ("con bò ăn cỏ", "con bơ ăn co"),
    "Thai": ("แมว ใกล้ บ้าน " * 9, "แมว ไกล บ้าน " * 9),
    "Thai without spaces": ("แมวนอนอยู่บนโซฟา" * 9, "แมวนอนอยบนโซฟา" * 9),
    "Arabic": ("مَدرسة", "مدرسة"),
    "Hebrew": ("שָׁלוֹם", "שלום"),
    "German": ("Ein schöner Bär", "Ein schoner Bar"),
    "emoji": ("a \U0001f436 \U0001f3fd", "a \U0001f431 \U0001f3fd"),
}


@pytest.mark.parametrize("script", OF_SCRIPTS)
def test_a_fitted_tokenizer_keeps_the_marks_of_every_script(script):
    texts = [captions.clean_caption(text, 30) for text in OF_SCRIPTS[script]]
    tokenizer = captions.fit_tokenizer(texts, 1000)
    ids, _ = captions.tokenize(tokenizer, texts, 40)
    assert (ids[0] != ids[1]).any() and tokenizer.unk_token_id not in ids
    # Neither case nor the Unicode form counts.
    for form in ("NFC", "NFD"):
        spelt = [unicodedata.normalize(form, text.upper()) for text in texts]
        np.testing.assert_array_equal(captions.tokenize(tokenizer, spelt, 40)[0], ids)


def test_a_fitted_tokenizer_tells_letters_marks_and_numbers_apart_within_its_size():
    letters = [chr(code) for code in range(0x80, 0x110000)]
    letters = [x for x in letters if unicodedata.category(x)[0] in "LMNS"][::53]
    texts = sorted({captions.clean_caption(f"x{x} {x}y", 30) for x in letters})
    ids, _ = captions.tokenize(captions.fit_tokenizer(texts, 2**16), texts, 12)
    assert len({row.tobytes() for row in ids}) == len(texts)
    # The commonest letters are kept where there is no room for all.
    texts += ["x\u00e9 \u00e9y"] * 2
    tokenizer = captions.fit_tokenizer(texts, 200)
    assert 190 < len(tokenizer) <= 200
    assert tokenizer.unk_token_id not in captions.tokenize(tokenizer, ["y\u00e9x"], 12)[0]


def test_long_captions_are_cut():
    tokenizer = captions.fit_tokenizer(TEXTS, 80)
    ids, mask = captions.tokenize(tokenizer, ["a red dog near the house " * 9], 7)
    assert mask.sum() == 7
    assert ids[0, -1] == tokenizer.sep_token_id


def test_saved_tokenizer_gives_the_same_ids(tmp_path, monkeypatch):
    tokenizer = captions.fit_tokenizer(TEXTS, 80)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = captions.load_tokenizer("~/tokenizer")
    for ours, theirs in zip(
        captions.tokenize(tokenizer, TEXTS, 12), captions.tokenize(loaded, TEXTS, 12), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_tokenizer_without_a_padding_token_is_refused(tmp_path):
    tokenizer = captions.fit_tokenizer(TEXTS, 80)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no padding token.*tokenizer_config.json"):
        captions.load_tokenizer(str(tmp_path))


def test_missing_tokenizer_says_what_else_to_give():
    with pytest.raises(UserError, match=r"folder that holds tokenizer.json.*'train'"):
        captions.load_tokenizer("nowhere/no-such-tokenizer")

"""A run's tokenizer gives the ids that it gave when the run began, or an error."""

import io
import json
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers as rust
import transformers

from fne_jax.data import captions
from fne_jax.data.sources.registry import load_split
from fne_jax.errors import UserError
from fne_jax.model import tokenizers
from tests.support import sources
from tests.support.tiny import tiny_config

TEXTS = ["a red circle left of a square", "two small blue stars", "an unknown \u00fcber-7", ""]
KINDS = ["bert", "clip", "siglip", "fast", "fitted"]
SETTINGS = {"tokenizer_config.json", "special_tokens_map.json"}


def write_bert(folder):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXTS[0].split()[:-2], "square", "##s"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return {"tokenizer_class": "BertTokenizer", "do_lower_case": True}


def write_clip(folder):
    letters = sorted(rust.pre_tokenizers.ByteLevel.alphabet())
    merges = ["r e", "re d</w>", "b l", "bl u", "blu e</w>", "s q"]
    made = [merge.replace(" ", "") for merge in merges]
    start, end = "<|startoftext|>", "<|endoftext|>"
    pieces = [*letters, *(letter + "</w>" for letter in letters), *made, start, end]
    (folder / "vocab.json").write_text(json.dumps({p: n for n, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return {"tokenizer_class": "CLIPTokenizer", **special}


def write_siglip(folder):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:3]), model_writer=model, vocab_size=60,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"tokenizer_class": "SiglipTokenizer", "model_input_names": ["input_ids"], **special}


def write_fast(folder):
    """Writes a tokenizer of no class of its own, without masks, that pads on the left."""
    captions.fit_tokenizer(TEXTS, 100).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    sides = {"padding_side": "left", "truncation_side": "left"}
    return settings | {"model_input_names": ["input_ids"], **sides}


def tokens_of(tokenizer, length=16):
    """Returns the ids and the masks of the texts, as lists."""
    return [array.tolist() for array in captions.tokenize(tokenizer, TEXTS, length)]


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """The workdir of a run with a tokenizer of some kind, and what this gives."""
    source, workdir = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("run")
    if request.param == "fitted":
        tokenizer = captions.fit_tokenizer(TEXTS, 100)
    else:
        about = globals()[f"write_{request.param}"]
        (source / "tokenizer_config.json").write_text(json.dumps(about(source)))
        (source / "config.json").write_text(
            json.dumps({"model_type": "bert" if request.param == "fast" else request.param})
        )
        tokenizer = captions.load_tokenizer(str(source))
    tokenizers.store_tokenizer(tokenizer, workdir)
    tokens = tokens_of(tokenizer), tokens_of(tokenizer, 6)
    assert len({tuple(row) for row in tokens[0][0]}) == len(TEXTS)
    return workdir, tokens


def flipped(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES = {
    "gone": None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "object": lambda content: b"{}",
    "list": lambda content: b"[]",
    "flipped": flipped,
}


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_a_stored_tokenizer_gives_the_same_ids_and_masks(run):
    tokenizer = tokenizers.stored_tokenizer(run[0])
    assert (tokens_of(tokenizer), tokens_of(tokenizer, 6)) == run[1]


@pytest.mark.parametrize("damage", [*DAMAGES, "folder"])
def test_a_damaged_file_of_a_tokenizer_is_named(run, copied, damage):
    names = sorted(path.name for path in (run[0] / "tokenizer").iterdir())
    assert len(names) >= 3
    for name in names:
        path = copied / "tokenizer" / name
        content = path.read_bytes()
        path.unlink()
        if damage == "folder":  # what cannot be read, to root as well
            path.mkdir()
        elif DAMAGES[damage] is not None:
            path.write_bytes(DAMAGES[damage](content))
        with pytest.raises(UserError) as error:
            tokenizers.stored_tokenizer(copied)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert "restore it from a copy" in str(error.value)
        if damage == "folder":
            path.rmdir()
        path.write_bytes(content)


@pytest.mark.parametrize("run", ["bert", "clip", "siglip"], indirect=True)
def test_a_file_that_transformers_alone_does_not_see_is_told(run, copied, monkeypatch):
    read = transformers.AutoTokenizer.from_pretrained
    folder = copied / "tokenizer"
    (vocabulary,) = {path.name for path in folder.iterdir()} - {"record.json", *SETTINGS}
    (folder / vocabulary).unlink()

    def read_without(_, **options):
        return read(str(folder), **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", read_without)
    message = "other ids or masks than when the run began|tokenizer cannot be loaded: "
    with pytest.raises(UserError, match=message):
        tokenizers.stored_tokenizer(run[0])


def test_what_a_model_does_not_read_of_a_text_is_told(run):
    workdir, _ = run
    tokenizer = tokenizers.stored_tokenizer(workdir)

    def unread(*texts):
        tokens = captions.tokenize(tokenizer, tokenizers.clean_captions(config, texts), 8)
        return tokenizers.unread(config, texts, tokenizer, tokens)

    config = tiny_config(data__max_words=20)
    assert unread("red", "Red.", "a") == ""
    limits = "cut to 20 words (config.data.max_words) or 8 tokens (config.data.text_length)"
    assert unread("red " * 40) == f"it is {limits}"
    long = [f"{'red ' * 6}{middle}{' red' * 6}" for middle in ("blue", "small", "blue")]
    assert unread("red", *long).startswith(
        f"3 of 4 captions (75.0%) are {limits}, such as {long[0]!r}; 1 of 4 captions (25.0%) are "
        f"equal to another in what is left, such as {long[1]!r} and {long[0]!r}"
    )
    assert "read with HTML's entities" in unread("red &amp; a", "red")
    assert tokenizers.clean_captions(config, ["Red &amp;amp; a"]) == ["red & a"]
    if not isinstance(tokenizer, transformers.CLIPTokenizer):  # it knows every byte
        assert unread("\u732b") == "it is without any word of the tokenizer's vocabulary"


@pytest.fixture
def prepared_split(tmp_path, monkeypatch):
    sources.write_jsonl(tmp_path / "source", sources.table_rows(tmp_path / "source"))
    config = tiny_config(
        data__source="jsonl",
        data__dir=str(tmp_path / "source"),
        data__cache_dir=str(tmp_path / "cache"),
    )
    monkeypatch.setattr(tokenizers, "_ROWS", 31)
    monkeypatch.setattr(captions, "_AT_A_TIME", 7)
    return config, load_split(config.data, 8, "train")


def test_tokens_of_a_prepared_split_are_kept(prepared_split, monkeypatch):
    config, split = prepared_split
    fitted = captions.fit_tokenizer(tokenizers.clean_captions(config, split.captions), 200)
    asked = []
    real = captions.tokenize

    def tokenize(tokenizer, texts, length):
        asked.append(len(texts))
        return real(tokenizer, texts, length)

    monkeypatch.setattr(captions, "tokenize", tokenize)
    for length, rows in ((9, [31, 31, 10]), (9, []), (5, [31, 31, 10])):
        asked.clear()
        ids, mask = tokenizers.kept_tokens(config, fitted, split, length)
        assert asked == rows and ids.dtype == np.uint8
        direct = fitted(
            tokenizers.clean_captions(config, split.captions), padding="max_length",
            truncation=True, max_length=length, return_tensors="np",
        )  # fmt: skip
        np.testing.assert_array_equal(ids, direct["input_ids"])
        np.testing.assert_array_equal(mask, direct["attention_mask"])


def test_tokens_where_nothing_can_be_kept(prepared_split, monkeypatch):
    config, split = prepared_split
    fitted = captions.fit_tokenizer(split.captions, 200)

    def refuse(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(tokenizers, "write_rows", refuse)
    ids, mask = tokenizers.kept_tokens(config, fitted, split, 9)
    assert ids.shape == mask.shape == (72, 9) and ids.dtype == np.int32

"""Tokenizers that only sentencepiece reads, as SigLIP's published checkpoints have them."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import transformers

from configs import flickr30k_siglip
from fne_jax.data import captions
from fne_jax.errors import UserError

CAPTIONS = ["a red circle left of a square", "a small blue star", "two green crosses", "a square"]


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    """A tokenizer of some pieces in the layout of google/siglip-base-patch16-384."""
    folder, model = tmp_path_factory.mktemp("siglip"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=60,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    about = {
        "tokenizer_class": "SiglipTokenizer",
        "model_input_names": ["input_ids"],
        **{"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    return folder


def test_siglips_tokenizer_is_read_and_kept(siglip_folder, tmp_path):
    assert "siglip" in flickr30k_siglip.get_config().encoder.text.pretrained
    tokenizer = captions.load_tokenizer(str(siglip_folder))
    ids, mask = captions.tokenize(tokenizer, CAPTIONS, 16)
    assert ids.shape == (4, 16) and (ids[:, -1] == 1).all() and mask.all()
    assert len({tuple(row) for row in ids}) == 4
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = captions.load_tokenizer(str(tmp_path / "tokenizer"))
    np.testing.assert_array_equal(captions.tokenize(again, CAPTIONS, 16)[0], ids)


def test_a_package_that_is_missing_is_named(monkeypatch):
    def lacking(name):
        raise ImportError(f"\nTokenizer requires the\nSentencePiece library, not found for {name}")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lacking)
    message = "tokenizer .x. .config.data.tokenizer, .* not installed: Tokenizer .* SentencePiece"
    with pytest.raises(UserError, match=message):
        captions.load_tokenizer("x")

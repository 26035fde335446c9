"""Caption cleaning, and tokenizers: loaded by name, from a folder, or fitted to the captions."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from fne_jax.errors import UserError
from fne_jax.files import as_user_error, expand_home

_SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
# Captions that are tokenized at a time; their objects take some 6 kB each meanwhile.
_AT_A_TIME = 16_384
TRAIN = "train"  # the tokenizer name that asks for a fitted one
AUTHORS, LOWER, NONE = CLEANINGS = ("authors", "lower", "none")


def clean_caption(text: str, max_words: int = 0, cleaning: str = "authors") -> str:
    """Returns a caption as a tokenizer gets it, in Unicode's form NFC with single spaces.

    Args:
      text: The caption; HTML's entities in it count as what they stand for.
      max_words: The most words that are kept; 0 for all.
      cleaning: "authors" for lower case without most punctuation, where hyphens and slashes part
        words and `<person>` loses its brackets, as in the authors' code; "lower"; or "none".
    """
    # Without names of this module, for model cards copy its source.
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)))
    text = text if cleaning == "none" else text.lower()
    if cleaning == "authors":
        text = re.sub(r"""[,.'!?"()*#:;~]""", "", re.sub(r"[-/]", " ", text))
        text = text.replace("<person>", "person")
    return " ".join(text.split()[: max_words or None])


def fit_tokenizer(captions: Sequence[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Returns a WordPiece tokenizer fitted to cleaned captions, which keeps accents and marks.

    Case and the Unicode form of a letter do not count. The same captions give the same ids in every
    process: special tokens come first, the other pieces in alphabetical order, `vocab_size` at
    most.
    """
    special = list(_SPECIAL.values())
    learner = _wordpiece(None)
    # Ahead of the trainer, which holds the normalizer's lock.
    texts = [learner.normalizer.normalize_str(caption) for caption in captions]
    seen = Counter()
    for text in texts:
        seen.update(text)
    # The commonest letters that there is room for, each as the beginning of a word and within one.
    ranked = sorted(seen, key=lambda letter: (-seen[letter], letter))
    known = ranked[: (vocab_size - len(special)) // 2]
    # The trainer breaks ties by number, and numbers the letters within words as it meets them, in
    # an order that differs from run to run; told them beforehand, it learns the same pieces. An
    # ideograph is a word by itself.
    within = [x for x in sorted(known) if learner.normalizer.normalize_str(x) == x]
    letters = [f"##{letter}" for letter in within]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special + letters, show_progress=False
    )
    rare = dict.fromkeys(map(ord, ranked[len(known) :]), " ")
    learner.train_from_iterator((text.translate(rare) for text in texts), trainer)
    pieces = special + sorted(set(learner.get_vocab()) - set(special))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = _wordpiece(vocabulary)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def _wordpiece(vocabulary):
    # Scripts without spaces have long words.
    longest = {"max_input_chars_per_word": 10_000}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", **longest))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.BertNormalizer(strip_accents=False, lowercase=True)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def load_tokenizer(name_or_path: str) -> transformers.PreTrainedTokenizerBase:
    """Returns a Hugging Face tokenizer by hub name or local folder.

    Raises UserError if there is none, it needs a package that is not installed, or cannot pad.
    """
    where = f"the tokenizer {name_or_path!r} (config.data.tokenizer, or the text encoder's own)"
    advice = (
        "give a name on the Hugging Face hub, the path of a folder that holds tokenizer.json, or "
        f"{TRAIN!r} to fit one to the training captions"
    )
    try:
        with as_user_error(f"{where} cannot be loaded", advice, (OSError, ValueError)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(expand_home(name_or_path))
    except ImportError as error:
        # Transformers names the package somewhere in a paragraph.
        reason = " ".join(str(error).split())
        raise UserError(f"{where} needs a package that is not installed: {reason}") from error
    if tokenizer.pad_token is None:
        raise UserError(
            f"{where} has no padding token, which captions of one length take; name one as "
            'pad_token in a copy of its tokenizer_config.json, e.g. its end token, "<|endoftext|>"'
        )
    return tokenizer


def tokenize(
    tokenizer: transformers.PreTrainedTokenizerBase, captions: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and masks, both [captions, length] int32, padded and truncated to `length`.

    Masks are 1 throughout for tokenizers that give none, such as SigLIP's, whose encoders were
    trained on padded texts.
    """
    ids, mask = (np.ones((len(captions), length), np.int32) for _ in range(2))
    for start in range(0, len(captions), _AT_A_TIME):
        rows = slice(start, start + _AT_A_TIME)
        encoded = tokenizer(
            list(captions[rows]),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="np",
        )
        ids[rows] = encoded["input_ids"]
        mask[rows] = encoded.get("attention_mask", 1)
    return ids, mask

"""The tokenizer of a run: fitted, loaded, or kept in its workdir."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import pathlib
from collections.abc import Sequence

import ml_collections
import numpy as np
import tokenizers
import transformers

from fne_jax import files
from fne_jax.data import captions as caption_lib
from fne_jax.data.feature_rows import read_rows, write_rows
from fne_jax.data.pairs import PairDataset
from fne_jax.encoders.hub_files import run_folder
from fne_jax.errors import EnvironmentFailure, UserError, first_line

DIRECTORY = "tokenizer"
_TOKENS = "tokens"
LOOKED_AT = 100_000
_ROWS = 65_536  # that are tokenized and written at a time
_ABOUT, _VOCABULARY = "tokenizer_config.json", "tokenizer.json"
# What the files are and what ids and masks come of them: transformers takes a file that it cannot
# read for one that is absent, and makes another tokenizer of what is left.
_RECORD = "record.json"
_RESTORE = "restore it from a copy of the workdir"
# Words, the letters and the digits for a vocabulary of any kind, and what none may know.
_PROBES = (
    "two dogs run along the beach while a man in a red shirt throws a ball",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9",
    "the quick brown fox's jumps over 42 lazy dogs, na\u00efve caf\u00e9 \u96ea",
    "",
)
_PROBE_LENGTH = 64
_SPECIAL = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
# All that a fitted tokenizer's settings have, and its class in transformers.
_FITTED = {"backend", "model_max_length", "tokenizer_class", *_SPECIAL}
_FITTED_CLASS = "TokenizersBackend"


def run_tokenizer(
    config: ml_collections.ConfigDict, workdir: pathlib.Path | None, captions: Sequence[str]
) -> transformers.PreTrainedTokenizerBase:
    """Returns the tokenizer of a run; nothing is written.

    It is the one in the workdir if there is one; else, if it is to be fitted, that of the run whose
    weights this run begins with, or a new one; else the one that the config names.

    Args:
      config: The resolved config.
      workdir: The folder of the run, or None for a run without one.
      captions: The raw training captions, to fit a tokenizer to.

    Raises:
      UserError: if the config names a tokenizer or a run that does not exist.
    """
    if workdir is not None and (workdir / DIRECTORY).is_dir():
        return stored_tokenizer(workdir)
    if config.data.tokenizer != caption_lib.TRAIN:
        return caption_lib.load_tokenizer(config.data.tokenizer)
    if config.init_from:
        with files.as_user_error(f"config.init_from={config.init_from}", errors=UserError):
            return stored_tokenizer(run_folder(config.init_from))
    return caption_lib.fit_tokenizer(clean_captions(config, captions), config.data.vocab_size)


def store_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, workdir: pathlib.Path) -> None:
    """Keeps a run's tokenizer in its workdir, unless one is there.

    Raises:
      EnvironmentFailure: If it cannot be written.
    """
    if (workdir / DIRECTORY).is_dir():
        return
    with files.whole_folder(workdir / DIRECTORY) as scratch:
        try:
            tokenizer.save_pretrained(scratch)
        except Exception as error:  # the Rust library raises bare Exceptions
            raise EnvironmentFailure(
                f"{workdir / DIRECTORY}: the tokenizer cannot be written: {first_line(error)}"
            ) from error
        record = {
            "transformers": transformers.__version__,
            "sha256": {path.name: _digest(path) for path in sorted(scratch.iterdir())},
            "tokens": _probed(tokenizer, _PROBES),
            "size": len(tokenizer),
        }
        files.write_atomically(scratch / _RECORD, json.dumps(record, indent=2) + "\n")


def stored_tokenizer(workdir: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Returns the tokenizer that a workdir holds.

    Raises:
      UserError: If there is none, its files are not those that were written, or it gives other ids
        than it did then.
    """
    folder = workdir / DIRECTORY
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: {workdir} is not the workdir of a run")
    record = _checked_record(folder)
    # The Rust library raises bare Exceptions.
    with files.as_user_error(f"{folder}: the run's tokenizer cannot be loaded", errors=Exception):
        tokenizer = _loaded(folder)
        tokens = _probed(tokenizer, list(record["tokens"]))
    if record["size"] != len(tokenizer) or record["tokens"] != tokens:
        raise UserError(
            f"{folder / _RECORD}: the tokenizer beside it gives other ids or masks than when the "
            f"run began; its transformers was {record['transformers']}, this one is "
            f"{transformers.__version__}: take that version, or {_RESTORE}"
        )
    return tokenizer


def _checked_record(folder):
    """Returns what `store_tokenizer` recorded, after checking the files.

    Raises:
      UserError: If a file is not what it was.
    """
    path = folder / _RECORD
    unreadable = (OSError, ValueError, KeyError, TypeError)
    with files.as_user_error(f"{path}: cannot be read", _RESTORE, unreadable):
        record = json.loads(path.read_text())
        digests = dict(record["sha256"])
        dict(record["tokens"]), record["size"], record["transformers"]  # are there
    for name, digest in digests.items():
        with files.as_user_error(f"{folder / name}: cannot be read", _RESTORE):
            found = _digest(folder / name)
        if found != digest:
            raise UserError(
                f"{folder / name}: is damaged, or was changed since the run began; {_RESTORE}"
            )
    return record


def _loaded(folder):
    about = json.loads((folder / _ABOUT).read_text())
    if about.get("tokenizer_class") != _FITTED_CLASS or about.keys() - _FITTED:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    # Not by transformers: it imports PyTorch to do so.
    fitted = tokenizers.Tokenizer.from_str((folder / _VOCABULARY).read_text())
    special = {name: about[name] for name in _SPECIAL if name in about}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fitted, **special)


def _probed(tokenizer, texts):
    ids, masks = caption_lib.tokenize(tokenizer, texts, _PROBE_LENGTH)
    return dict(zip(texts, np.stack([ids, masks], axis=1).tolist(), strict=True))


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def clean_captions(config: ml_collections.ConfigDict, captions: Sequence[str]) -> list[str]:
    """Returns captions as the tokenizer gets them.

    They are cleaned as `data.cleaning` says, cut to `data.max_words` words, and begin with
    `data.prompt`.
    """
    data = config.data
    cleaned = (caption_lib.clean_caption(text, data.max_words, data.cleaning) for text in captions)
    # As sentence-transformers strips what it is given.
    return [f"{data.prompt}{text}".strip() for text in cleaned] if data.prompt else list(cleaned)


def kept_tokens(
    config: ml_collections.ConfigDict,
    tokenizer: transformers.PreTrainedTokenizerBase,
    dataset: PairDataset,
    length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids and masks of a prepared split's captions, both [captions, length] integers.

    They lie in `data.cache_dir/tokens`, in as few bytes as the ids need, under a digest of all that
    they depend on; they are written there if they can be.

    Args:
      config: The resolved config.
      tokenizer: The tokenizer, a fast one.
      dataset: The split.
      length: The number of tokens.
    """

    def tokens(rows):
        cleaned = clean_captions(config, dataset.captions[rows])
        return caption_lib.tokenize(tokenizer, cleaned, length)

    data, backend = config.data, json.loads(tokenizer.backend_tokenizer.to_str())
    del backend["padding"], backend["truncation"]  # as it was called last
    about = {
        "captions": dataset.identity.checksum,
        "cleaning": [data.cleaning, data.max_words, data.prompt],
        "tokenizer": hashlib.sha256(json.dumps(backend).encode()).hexdigest(),
        "options": [tokenizer.padding_side, list(tokenizer.model_input_names), length],
        "transformers": transformers.__version__,
    }
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    folder = pathlib.Path(files.expand_home(data.cache_dir)) / _TOKENS / digest
    count, dtype = len(dataset.captions), np.min_scalar_type(len(tokenizer))
    blocks = (slice(start, start + _ROWS) for start in range(0, count, _ROWS))
    parts = (np.stack(tokens(rows), axis=1).astype(dtype) for rows in blocks)
    # Another process may write it first, and a cache may be read-only.
    with contextlib.suppress(OSError):
        if not folder.exists():
            write_rows(folder, about, parts, None)
    found = read_rows(folder, about, count, None)
    return tokens(slice(None)) if found is None else (found.values[:, 0], found.values[:, 1])


def unread(
    config: ml_collections.ConfigDict,
    captions: Sequence[str],
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    tokens: tuple[np.ndarray, np.ndarray] | None = None,
) -> str:
    """Returns in a line what is lost of captions before they are embedded; "" where nothing is.

    That is what is cut, what has no known word, and what is thereby equal to another caption that
    differs in more than case, punctuation and spaces, each with its number and an example.

    Args:
      config: The resolved config.
      captions: The raw captions, of which the first 100,000 are looked at.
      tokenizer: The tokenizer; None to look at words alone.
      tokens: The captions' ids and masks, both [captions, length] integers, unless at words alone.
    """
    first_few = "the first " if len(captions) > LOOKED_AT else ""
    captions = captions[:LOOKED_AT]
    used, data = clean_captions(config, captions), config.data
    words = [caption_lib.clean_caption(text) for text in captions]
    limits = [f"{data.max_words} words (config.data.max_words)"] if data.max_words else []
    cut = {n for n, text in enumerate(words) if limits and len(text.split()) > data.max_words}
    unknown: list[int] = []
    keys: Sequence[str | bytes] = used
    if tokenizer is not None and tokens is not None and len(captions):
        ids, mask = (array[:LOOKED_AT] for array in tokens)
        limits.append(f"{ids.shape[1]} tokens (config.data.text_length)")
        full = np.flatnonzero(mask.all(axis=1)).tolist()
        # Not verbose: it would warn of the length itself.
        whole = tokenizer([used[n] for n in full], verbose=False)["input_ids"] if full else []
        cut |= {n for n, row in zip(full, whole, strict=True) if len(row) > ids.shape[1]}
        # SigLIP's has a token for the space before a word.
        read = set(np.unique(ids).tolist()) - set(tokenizer.all_special_ids)
        read = [token for token in read if tokenizer.decode([token]).strip()]
        of_prompt = tokenizer(clean_captions(config, [""]))["input_ids"][0]
        known = np.isin(ids, read) & ~np.isin(ids, of_prompt)
        unknown = np.flatnonzero(~known.any(axis=1)).tolist()
        keys = [row.tobytes() for row in ids]
    first: dict[str | bytes, int] = {}
    equal = [n for n, key in enumerate(keys) if words[first.setdefault(key, n)] != words[n]]

    def part(rows, what):
        if len(captions) == 1:
            return f"it is {what}"
        of = f"{first_few}{len(captions):,} captions"
        share = f"{len(rows):,} of {of} ({len(rows) / len(captions):.1%})"
        return f"{share} are {what}, such as {captions[rows[0]]!r:.80}"

    parts = [part(sorted(cut), f"cut to {' or '.join(limits)}")] if cut else []
    entities = [n for n, text in enumerate(captions) if html.unescape(text) != text]
    if entities:
        parts.append(part(entities, "read with HTML's entities as what they stand for"))
    if unknown:
        parts.append(part(unknown, "without any word of the tokenizer's vocabulary"))
    if equal:
        other = captions[first[keys[equal[0]]]]
        parts.append(f"{part(equal, 'equal to another in what is left')} and {other!r:.80}")
    return "; ".join(parts)

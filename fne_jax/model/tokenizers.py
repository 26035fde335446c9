"""The tokenizer of a run: fitted, loaded, or kept in its workdir."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import ml_collections
import tokenizers
import transformers

from fne_jax.data import captions as caption_lib
from fne_jax.errors import UserError

DIRECTORY = "tokenizer"
_ABOUT, _VOCABULARY = "tokenizer_config.json", "tokenizer.json"
_SPECIAL = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
# The class of fitted tokenizers, by its name in transformers before and since version 5.
_FITTED = ("PreTrainedTokenizerFast", "TokenizersBackend")


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
      UserError: if the config names a tokenizer or a run that is not there.
    """
    if workdir is not None and (workdir / DIRECTORY).is_dir():
        return stored_tokenizer(workdir)
    if config.data.tokenizer != caption_lib.TRAIN:
        return caption_lib.load_tokenizer(config.data.tokenizer)
    if config.init_from:
        source = pathlib.Path(config.init_from).expanduser()
        try:
            return stored_tokenizer(source)
        except UserError as error:
            raise UserError(f"config.init_from={config.init_from}: {error}") from error
    return caption_lib.fit_tokenizer(clean_captions(config, captions), config.data.vocab_size)


def store_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, workdir: pathlib.Path) -> None:
    """Keeps a run's tokenizer in its workdir, unless one is there."""
    if not (workdir / DIRECTORY).is_dir():
        caption_lib.save_tokenizer(tokenizer, workdir / DIRECTORY)


def stored_tokenizer(workdir: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Returns the tokenizer that a workdir holds.

    Raises:
      UserError: if there is none.
    """
    folder = workdir / DIRECTORY
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: {workdir} is not the workdir of a run")
    try:
        about = json.loads((folder / _ABOUT).read_text())
        if about.get("tokenizer_class") not in _FITTED:
            return caption_lib.load_tokenizer(str(folder))
        # Not by transformers: it imports PyTorch to do so, and takes an empty vocabulary for files
        # that it cannot read.
        fitted = tokenizers.Tokenizer.from_str((folder / _VOCABULARY).read_text())
    except Exception as error:  # the Rust library raises bare Exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the run's tokenizer cannot be loaded: {reason}") from error
    special = {name: about[name] for name in _SPECIAL if name in about}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fitted, **special)


def clean_captions(config: ml_collections.ConfigDict, captions: Sequence[str]) -> list[str]:
    """Returns captions as the tokenizer gets them: cleaned, and cut to `data.max_words` words."""
    return [caption_lib.clean_caption(text, config.data.max_words) for text in captions]

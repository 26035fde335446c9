"""The cases that are measured unless the command line says otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from fne_jax.benchmarks import encoders, pytorch_peer, strategy
from fne_jax.configuration import with_model_defaults
from fne_jax.errors import UserError

# Batch, slots and dimension: the paper's own setting, and a large batch over a long queue.
STRATEGY_CASES = ((32, 8224, 768), (256, 65536, 768))
# Keys scored at a time that suit a CPU's cache; measured beside all at once.
KEY_CHUNK = 1024
# Parameters of ViT-B/16 and BERT-base together, rounded.
_PARAMETERS = 200_000_000
# The configs whose encoders are measured; configs/ is not part of the installed package.
ENCODER_SIZES = {
    "vit_b16_384": "configs.base",
    "shapes": "configs.shapes",
    "flickr8k": "configs.flickr8k",
}
# Ids of BERT-base's tokenizer.
_BERT_IDS = 30522


def strategy_lines(
    batch: int | None, queue_size: int | None, dim: int | None, key_chunk: int | None, repeats: int
) -> Iterator[dict[str, Any]]:
    """Yields the strategy's lines, then the queue's and the momentum encoders'.

    Args:
      batch: Anchors; None for `STRATEGY_CASES`, or the first of them where others are given.
      queue_size: Slots of the queue, or None.
      dim: Dimension of the embeddings, or None.
      key_chunk: Keys scored at a time; None for all at once, and `KEY_CHUNK`.
      repeats: Timed calls of each.

    Raises:
      UserError: if the queue is shorter than a batch.
    """
    given, cases = (batch, queue_size, dim), STRATEGY_CASES
    if any(value is not None for value in given):
        cases = (tuple(v or d for v, d in zip(given, STRATEGY_CASES[0], strict=True)),)
    for batch, queue_size, dim in cases:
        if batch > queue_size:
            raise UserError(f"--queue is {queue_size}; expected at least a batch, {batch}")
        for chunk in (None, KEY_CHUNK) if key_chunk is None else (key_chunk,):
            yield strategy.strategy(batch, queue_size, dim, chunk, repeats)
        yield strategy.queue_update(batch, queue_size, dim, repeats)
    yield strategy.momentum_update(_PARAMETERS, repeats)


def encoder_lines(
    sizes: Sequence[str], batch: int, repeats: int, *, dtype: str | None, against_pytorch: bool
) -> Iterator[dict[str, Any]]:
    """Yields for each size the encoders' line and one for each implementation of attention.

    Args:
      sizes: Keys of `ENCODER_SIZES`.
      batch: Pairs.
      repeats: Timed calls of each.
      dtype: The compute dtype; None for the config's.
      against_pytorch: Whether to yield the lines of the image tower and its parts beside PyTorch's
        instead.

    Raises:
      UserError: if the configs or PyTorch are not there.
    """
    for size in sizes:
        config = _config_of_size(size)
        encoder, data = config.encoder, config.data
        encoder.compute_dtype = dtype or encoder.compute_dtype
        vocab_size = _BERT_IDS if size == "vit_b16_384" else data.vocab_size
        if against_pytorch:
            lines = pytorch_peer.image_tower(encoder, batch, repeats)
        else:
            lines = _own_lines(encoder, vocab_size, data.text_length, batch, repeats)
        for line in lines:
            yield {"size": size} | line


def _own_lines(encoder, vocab_size, text_length, batch, repeats):
    yield encoders.encoders(encoder, vocab_size, text_length, batch, repeats)
    yield from encoders.attention(encoder, batch, repeats)


def _config_of_size(size: str) -> ml_collections.ConfigDict:
    try:
        module = importlib.import_module(ENCODER_SIZES[size])
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error}: the sizes are those of configs/; run this from the top of the repository"
        ) from error
    return with_model_defaults(module.get_config(), architectures={})

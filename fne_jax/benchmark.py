"""Measures speed: python -m fne_jax.benchmark strategy, encoders, input or retrieval."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from typing import Any

from fne_jax import command_line
from fne_jax.errors import UserError

# The paper's own setting, and a large batch over a long memory.
STRATEGY_CASES = ((32, 8224, 768), (256, 65536, 768))
# Keys scored at a time that suit a CPU's cache; measured beside all at once.
KEY_CHUNK = 1024
# The configs whose encoders are measured.
ENCODER_SIZES = {
    "vit_b16_384": "configs.base",
    "shapes": "configs.shapes",
    "flickr8k": "configs.flickr8k",
}
# Ids of BERT-base's tokenizer.
_BERT_IDS = 30522


def main(arguments: list[str]) -> None:
    """Parses the command line, measures, and prints one JSON object a line."""
    parser = command_line.parser("Measures speed; prints JSON lines.", "benchmark")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    strategy = commands.add_parser(
        "strategy", help="FNE's loss and gradient against two bare products; memory and momentum"
    )
    strategy.add_argument("--batch", type=int, help="anchors (32 and 256 by default)")
    strategy.add_argument("--queue", type=int, help="slots (8,224 and 65,536 by default)")
    strategy.add_argument("--dim", type=int, help="dimension (768 by default)")
    strategy.add_argument(
        "--key-chunk", type=int, help=f"keys scored at a time (all, and {KEY_CHUNK})"
    )
    strategy.add_argument("--repeats", type=int, default=9, help="timed calls of each")
    strategy.set_defaults(measure=measure_strategy)
    encoders = commands.add_parser(
        "encoders", help="both towers forward and in training, and attention alone"
    )
    encoders.add_argument("--batch", type=int, default=8, help="pairs")
    encoders.add_argument("--repeats", type=int, default=3, help="timed calls of each")
    encoders.add_argument(
        "--size",
        nargs="+",
        choices=list(ENCODER_SIZES),
        default=list(ENCODER_SIZES),
        help="encoders to measure (all by default)",
    )
    encoders.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="compute dtype (the config's by default)"
    )
    encoders.add_argument(
        "--against-pytorch",
        action="store_true",
        help="measure the image tower and its parts against PyTorch's instead (CPU, float32)",
    )
    encoders.set_defaults(measure=measure_encoders)
    images = commands.add_parser(
        "input", help="training images read, decoded, augmented and batched, beside PIL"
    )
    images.add_argument("--images", "--pictures", type=int, default=64, help="images to render")
    images.add_argument("--batch", type=int, default=32, help="images in a batch")
    images.add_argument("--batches", type=int, default=16, help="in each measurement")
    images.add_argument("--repeats", type=int, default=5, help="measurements of each pipeline")
    images.set_defaults(measure=measure_input)
    ranking = commands.add_parser(
        "retrieval", help="recalls and ranks of a test split against the bare product"
    )
    ranking.add_argument("--images", type=int, default=5000, help="images to rank")
    ranking.add_argument("--captions", type=int, default=25000, help="captions to rank")
    ranking.add_argument("--dim", type=int, default=768, help="dimension")
    ranking.add_argument("--repeats", type=int, default=5, help="timed calls of each")
    ranking.set_defaults(measure=measure_retrieval)
    options = parser.parse_args(arguments)
    for line in options.measure(options):
        print(json.dumps(line), flush=True)


def measure_strategy(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the strategy's lines, one a case, then the memory's and the momentum encoders'.

    Raises:
      UserError: on numbers that cannot be.
    """
    from fne_jax.benchmarks import strategy

    given = (options.batch, options.queue, options.dim)
    _check_positive(options, "batch", "queue", "dim", "repeats")
    cases = STRATEGY_CASES
    if any(value is not None for value in given):
        cases = (tuple(v or d for v, d in zip(given, STRATEGY_CASES[0], strict=True)),)
    for batch, queue_size, dim in cases:
        if batch > queue_size:
            raise UserError(f"--queue is {queue_size}; expected at least a batch, {batch}")
        chunks = (None, KEY_CHUNK) if options.key_chunk is None else (options.key_chunk,)
        for key_chunk in chunks:
            yield strategy.strategy(batch, queue_size, dim, key_chunk, options.repeats)
        yield strategy.queue_update(batch, queue_size, dim, options.repeats)
    yield strategy.momentum_update(200_000_000, options.repeats)


def measure_encoders(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields for each size the encoders' line and one for each implementation of attention.

    Against PyTorch, the lines of the image tower and its parts.

    Raises:
      UserError: on numbers that cannot be, or if the configs or PyTorch are not there.
    """
    from fne_jax.benchmarks import encoders, pytorch_peer

    _check_positive(options, "batch", "repeats")
    for size in options.size:
        config = _config_of_size(size)
        encoder, data = config.encoder, config.data
        encoder.compute_dtype = options.dtype or encoder.compute_dtype
        vocab_size = _BERT_IDS if size == "vit_b16_384" else data.vocab_size
        named = {"size": size}
        if options.against_pytorch:
            for line in pytorch_peer.image_tower(encoder, options.batch, options.repeats):
                yield named | line
            continue
        yield named | encoders.encoders(
            encoder, vocab_size, data.text_length, options.batch, options.repeats
        )
        for line in encoders.attention(encoder, options.batch, options.repeats):
            yield named | line


def measure_input(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the lines of this project's pipeline and PIL's, their stages, and devices' needs.

    Raises:
      UserError: on numbers that cannot be.
    """
    from fne_jax.benchmarks import input as input_benchmark

    names = ("images", "batch", "batches", "repeats")
    _check_positive(options, *names)
    yield from input_benchmark.input_pipeline(*(getattr(options, name) for name in names))


def measure_retrieval(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the retrieval metrics' line.

    Raises:
      UserError: on numbers that cannot be.
    """
    from fne_jax.benchmarks import retrieval

    names = ("images", "captions", "dim", "repeats")
    _check_positive(options, *names)
    if options.captions < options.images:
        raise UserError(
            f"--captions is {options.captions}; expected one for each image, {options.images}"
        )
    yield retrieval.retrieval(*(getattr(options, name) for name in names))


def _config_of_size(size):
    from fne_jax.configuration import with_model_defaults

    try:
        module = importlib.import_module(ENCODER_SIZES[size])
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error}: the sizes are those of configs/; run this from the top of the repository"
        ) from error
    return with_model_defaults(module.get_config(), architectures={})


def _check_positive(options, *names):
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected a number above 0")


if __name__ == "__main__":
    command_line.run(main)

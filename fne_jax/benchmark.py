"""Measures speed: python -m fne_jax.benchmark strategy, encoders, input or retrieval."""

from __future__ import annotations

import argparse
import json

from fne_jax import command_line
from fne_jax.benchmarks import cases, retrieval
from fne_jax.benchmarks import input as input_benchmark
from fne_jax.errors import UserError


def main(arguments: list[str]) -> None:
    """Parses the command line, measures, and prints one JSON object a line.

    Raises:
      UserError: on numbers that cannot be, or if a config or package is missing.
    """
    options = _parse(arguments)
    for line in options.measure(options):
        print(json.dumps(line), flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.parser("Measures speed; prints JSON lines.", "benchmark")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    _add_strategy(commands)
    _add_encoders(commands)
    _add_input(commands)
    _add_retrieval(commands)
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {value}; expected a number above 0")
    return options


def _add_strategy(commands):
    parser = commands.add_parser(
        "strategy", help="FNE's loss and gradient against two bare products; queue and momentum"
    )
    parser.add_argument("--batch", type=int, help="anchors (32 and 256 by default)")
    parser.add_argument("--queue", type=int, help="slots (8,224 and 65,536 by default)")
    parser.add_argument("--dim", type=int, help="dimension (768 by default)")
    parser.add_argument(
        "--key-chunk", type=int, help=f"keys scored at a time (all, and {cases.KEY_CHUNK})"
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each")
    parser.set_defaults(
        measure=lambda o: cases.strategy_lines(o.batch, o.queue, o.dim, o.key_chunk, o.repeats)
    )


def _add_encoders(commands):
    parser = commands.add_parser(
        "encoders", help="both towers forward and in training, and attention alone"
    )
    parser.add_argument("--batch", type=int, default=8, help="pairs")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each")
    sizes = list(cases.ENCODER_SIZES)
    parser.add_argument(
        "--size",
        nargs="+",
        choices=sizes,
        default=sizes,
        help="encoders to measure (all by default)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="compute dtype (the config's by default)"
    )
    parser.add_argument(
        "--against-pytorch",
        action="store_true",
        help="measure the image tower and its parts against PyTorch's instead (CPU, float32)",
    )
    parser.set_defaults(
        measure=lambda o: cases.encoder_lines(
            o.size, o.batch, o.repeats, dtype=o.dtype, against_pytorch=o.against_pytorch
        )
    )


def _add_input(commands):
    parser = commands.add_parser(
        "input", help="training images read, decoded, augmented and batched, beside PIL"
    )
    # --pictures is its name of old.
    parser.add_argument("--images", "--pictures", type=int, default=64, help="images to render")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--batches", type=int, default=16, help="in each measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each pipeline")
    parser.set_defaults(
        measure=lambda o: input_benchmark.input_pipeline(o.images, o.batch, o.batches, o.repeats)
    )


def _add_retrieval(commands):
    parser = commands.add_parser(
        "retrieval", help="recalls and ranks of a test split against the bare product"
    )
    parser.add_argument("--images", type=int, default=5000, help="images to rank")
    parser.add_argument("--captions", type=int, default=25000, help="captions to rank")
    parser.add_argument("--dim", type=int, default=768, help="dimension")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each")
    parser.set_defaults(
        measure=lambda o: [retrieval.retrieval(o.images, o.captions, o.dim, o.repeats)]
    )


if __name__ == "__main__":
    command_line.run(main)

"""Measures speed: python -m fne_jax.benchmark strategy [--batch 32 --queue 8224 --dim 768]."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from fne_jax import command_line
from fne_jax.errors import UserError

# The paper's own setting, and a large batch over a long memory.
STRATEGY_CASES = ((32, 8224, 768), (256, 65536, 768))
# Keys scored at a time that suit a CPU's cache; measured beside all at once.
KEY_CHUNK = 1024


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
    options = parser.parse_args(arguments)
    for line in options.measure(options):
        print(json.dumps(line), flush=True)


def measure_strategy(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the strategy's lines, one a case, then the memory's and the momentum encoders'.

    Raises:
      UserError: on numbers that cannot be.
    """
    from fne_jax.benchmarks import strategy
    from fne_jax.objectives.key_blocks import BLOCK

    given = (options.batch, options.queue, options.dim)
    for name in ("batch", "queue", "dim", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected a number above 0")
    if options.key_chunk is not None and (options.key_chunk < 1 or options.key_chunk % BLOCK):
        raise UserError(f"--key-chunk is {options.key_chunk}; expected a multiple of {BLOCK}")
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


if __name__ == "__main__":
    command_line.run(main)

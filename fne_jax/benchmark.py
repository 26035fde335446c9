"""Measures speed: python -m fne_jax.benchmark NAME.

NAME is strategy, step, input, data, retrieval or search.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys

import jax

from fne_jax import command_line, configuration
from fne_jax.benchmarks import data, ranking, step, step_comparison, strategy
from fne_jax.benchmarks import input as input_benchmark
from fne_jax.errors import UserError, needs_extra
from fne_jax.files import as_user_error, write_atomically


def main(arguments: list[str]) -> None:
    """Parses the command line, measures, and prints one JSON object per line.

    Raises:
      UserError: on invalid numbers, or if a config or package is missing.
    """
    options = _parse(arguments)
    for line in options.measure(options):
        print(json.dumps(line), flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.parser("Measures speed; prints JSON lines.", "benchmark")
    add = functools.partial(_add, parser.add_subparsers(dest="benchmark", required=True))
    add(
        "strategy",
        "FNE's loss and gradient, against two matrix products alone",
        lambda o: strategy.strategy_lines(o.repeats),
        repeats=(9, "timed calls of each"),
    )
    _add_step(add)
    add(
        "input",
        "reading, decoding, augmenting and batching of training images",
        lambda o: input_benchmark.input_pipeline(o.images, o.batch, o.batches, o.repeats),
        images=(64, "images to render"),
        batch=(32, "images in a batch"),
        batches=(16, "in each measurement"),
        repeats=(5, "measurements"),
    )
    command = add(
        "data",
        "preparing, starting and reading, by the size of the dataset",
        lambda o: data.data_lines(o.pairs, o.batches),
        batches=(200, "batches of 128 images to read"),
    )
    command.add_argument(
        "--pairs",
        type=int,
        nargs="+",
        default=[10_000, 100_000, 1_000_000],
        help="training pairs of each dataset (10^4, 10^5 and 10^6 by default; 10^6 take 5 GB)",
    )
    add(
        "retrieval",
        "recalls and ranks of a test split, against the matrix product alone",
        lambda o: [ranking.retrieval(o.images, o.captions, o.dim, o.repeats)],
        images=(5000, "images to rank"),
        captions=(25000, "captions to rank"),
        dim=(768, "dimension"),
        repeats=(5, "timed calls of each"),
    )
    add(
        "search",
        "one exact query among many stored rows",
        lambda o: [ranking.search(o.rows, o.dim, o.repeats)],
        rows=(1_000_000, "stored rows"),
        dim=(768, "dimension"),
        repeats=(9, "timed queries"),
    )
    options, overrides = parser.parse_known_args(arguments)
    if "config" in options:
        options.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    for name, value in vars(options).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number < 1:
                raise UserError(f"--{name} is {number}; expected a number above 0")
    return options


def _add(commands, name, about, measure, *, config=None, **numbers):
    """Adds a command whose options are numbers: by name, the default and the help."""
    parser = commands.add_parser(name, help=about)
    if config:
        parser.add_argument("--config", required=True, help=f"config file, e.g. {config}")
    for option, (default, meaning) in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=meaning)
    parser.set_defaults(measure=measure)
    return parser


def _add_step(add):
    parser = add(
        "step",
        "a config's whole train step on one device, against PyTorch's and its plan; config "
        "fields as --config.x=y",
        lambda o: [_step(o)],
        config="configs/flickr30k.py",
        batch=(None, "pairs in a batch (the config's by default)"),
        steps=(10, "steps in a window"),
        windows=(5, "timed windows in a round"),
        rounds=(2, "processes of each part, in turns"),
    )
    parser.add_argument("--out", type=pathlib.Path, help="JSON file, written after every part")
    parser.add_argument("--peak-tflops", type=float, help="of the device (its chip's by default)")
    parser.add_argument("--topology", help="of the plan (one of the device's chip by default)")
    parser.add_argument(
        "--part", choices=step_comparison.PARTS, help="measure this part alone, in this process"
    )
    parser.add_argument(
        "--platform", choices=("cpu", "gpu", "tpu"), help="what PyTorch's part must run on"
    )
    parser.add_argument(
        "--pytorch-python",
        default=sys.executable,
        help="interpreter for PyTorch's parts, if its CUDA libraries differ from JAX's",
    )


def _config(options):
    return configuration.load_config(options.config, options.overrides)


def _step(options):
    if options.batch is not None:
        options.overrides.append(f"--config.global_batch_size={options.batch}")
    config = _config(options)
    if options.part == step_comparison.JAX:
        return step.jax_step(config, options.steps, options.windows)
    # The device is left to the part that is measured.
    jax.config.update("jax_platforms", "cpu")
    if options.part:
        precision = options.part.removeprefix("pytorch_")
        with needs_extra("convert", "the comparison"):
            from fne_jax.benchmarks import pytorch
        return pytorch.pytorch_step(
            config, precision, options.steps, options.windows, platform=options.platform
        )
    arguments = [f"--config={options.config}", *options.overrides]

    def run_part(name, platform):
        windows = [f"--steps={options.steps}", f"--windows={options.windows}", f"--part={name}"]
        on = [f"--platform={platform}"] if platform else []
        python = sys.executable if name == step_comparison.JAX else options.pytorch_python
        command = [python, "-m", "fne_jax.benchmark", "step", *windows, *on, *arguments]
        # JAX would leave a quarter of a GPU's memory alone.
        return step_comparison.json_of(command, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"})

    def run_plan(topology):
        command = [sys.executable, "-m", "fne_jax.plan", f"--topology={topology}", "--json"]
        environment = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return step_comparison.json_of([*command, *arguments], environment)

    def save(result):
        if options.out:
            with as_user_error(f"--out={options.out} cannot be written"):
                write_atomically(options.out, json.dumps(result, indent=1) + "\n")

    save({})
    return step_comparison.compare(
        config,
        options.rounds,
        run_part=run_part,
        run_plan=run_plan,
        peak_flops=options.peak_tflops and options.peak_tflops * 1e12,
        topology=options.topology,
        save=save,
    )


if __name__ == "__main__":
    command_line.run(main)

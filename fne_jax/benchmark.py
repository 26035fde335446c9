"""Measures speed: python -m fne_jax.benchmark NAME.

NAME is strategy, encoders, step, frozen, input, retrieval or search.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys

from fne_jax import command_line, configuration
from fne_jax.benchmarks import encoders, ranking, step, step_comparison, strategy
from fne_jax.benchmarks import input as input_benchmark
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, write_atomically
from fne_jax.planning.published import read_architectures


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
    _add_step(commands)
    _add_frozen(commands)
    _add(
        commands,
        "input",
        "training images read, decoded, augmented and batched, beside PIL",
        lambda o: input_benchmark.input_pipeline(o.images, o.batch, o.batches, o.repeats),
        images=(64, "images to render"),
        batch=(32, "images in a batch"),
        batches=(16, "in each measurement"),
        repeats=(5, "measurements of each pipeline"),
    )
    _add(
        commands,
        "retrieval",
        "recalls and ranks of a test split against the bare product",
        lambda o: [ranking.retrieval(o.images, o.captions, o.dim, o.repeats)],
        images=(5000, "images to rank"),
        captions=(25000, "captions to rank"),
        dim=(768, "dimension"),
        repeats=(5, "timed calls of each"),
    )
    _add(
        commands,
        "search",
        "one exact query among many stored rows",
        lambda o: [ranking.search(o.rows, o.dim, o.repeats)],
        rows=(1_000_000, "stored rows"),
        dim=(768, "dimension"),
        repeats=(9, "timed queries"),
    )
    options, overrides = parser.parse_known_args(arguments)
    if "overrides" in options:
        options.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    for name, value in vars(options).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {value}; expected a number above 0")
    return options


def _add(commands, name, about, measure, *, config=None, **numbers):
    """Adds a command whose options are numbers: by name, the default and what is said of it."""
    parser = commands.add_parser(name, help=about)
    if config:
        parser.add_argument("--config", required=True, help=f"config file, e.g. {config}")
        parser.set_defaults(overrides=())
    for option, (default, meaning) in numbers.items():
        flag = "--" + option.replace("_", "-")
        parser.add_argument(flag, type=int, default=default, help=meaning)
    parser.set_defaults(measure=measure)
    return parser


def _add_strategy(commands):
    _add(
        commands,
        "strategy",
        "FNE's loss and gradient against two bare products; queue and momentum",
        lambda o: strategy.strategy_lines(o.batch, o.queue, o.dim, o.key_chunk, o.repeats),
        batch=(None, "anchors (32 and 256 by default)"),
        queue=(None, "slots (8,224 and 65,536 by default)"),
        dim=(None, "dimension (768 by default)"),
        key_chunk=(None, f"keys scored at a time (all, and {strategy.KEY_CHUNK})"),
        repeats=(9, "timed calls of each"),
    )


def _add_encoders(commands):
    parser = _add(
        commands,
        "encoders",
        "both towers forward and in training, and attention alone",
        lambda o: encoders.encoder_lines(
            o.size, o.batch, o.repeats, dtype=o.dtype, against_pytorch=o.against_pytorch
        ),
        batch=(8, "pairs"),
        repeats=(3, "timed calls of each"),
    )
    sizes = list(encoders.SIZES)
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


def _add_step(commands):
    parser = _add(
        commands,
        "step",
        "a config's whole train step on one device, beside PyTorch's and its plan; config "
        "fields as --config.x=y",
        lambda o: [_step(o)],
        config="configs/flickr30k.py",
        batch=(None, "pairs in a batch (the config's by default)"),
        steps=(10, "steps in a window"),
        windows=(5, "timed windows in a round"),
        rounds=(2, "processes of each part, in turns"),
        seconds=(900, "most that a part may take"),
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
        help="interpreter of PyTorch's parts, where its CUDA libraries are others than JAX's",
    )


def _add_frozen(commands):
    _add(
        commands,
        "frozen",
        "a config's train step with more and more of its encoders frozen, on one device; "
        "config fields as --config.x=y",
        lambda o: [_frozen(o)],
        config="configs/photographs.py",
        repeats=(5, "timed steps of each"),
    )


def _frozen(options):
    config = configuration.load_config(options.config, options.overrides)
    return step.frozen_steps(config, read_architectures(config.encoder), options.repeats)


def _step(options):
    overrides = list(options.overrides)
    if options.batch is not None:
        overrides.append(f"--config.global_batch_size={options.batch}")
    config = configuration.load_config(options.config, overrides)
    if options.part:
        return _part(options, config)
    arguments = [f"--config={options.config}", *overrides]
    if options.out:
        _write(options.out, {})

    def run_part(name, platform):
        windows = [f"--steps={options.steps}", f"--windows={options.windows}", f"--part={name}"]
        on = [f"--platform={platform}"] if platform else []
        python = sys.executable if name == step_comparison.JAX else options.pytorch_python
        command = [python, "-m", "fne_jax.benchmark", "step", *windows, *on, *arguments]
        # JAX would leave a quarter of a GPU's memory alone.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
        return step_comparison.json_of(command, environment, options.seconds)

    def run_plan(topology):
        command = [sys.executable, "-m", "fne_jax.plan", f"--topology={topology}", "--json"]
        environment = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return step_comparison.json_of([*command, *arguments], environment, options.seconds)

    save = functools.partial(_write, options.out) if options.out else lambda result: None
    return step_comparison.compare(
        config,
        options.rounds,
        run_part=run_part,
        run_plan=run_plan,
        peak_flops=options.peak_tflops and options.peak_tflops * 1e12,
        topology=options.topology,
        save=save,
    )


def _part(options, config):
    if options.part == step_comparison.JAX:
        return step.jax_step(config, options.steps, options.windows)
    precision = options.part.removeprefix("pytorch_")
    return encoders.import_pytorch().pytorch_step(
        config, precision, options.steps, options.windows, platform=options.platform
    )


def _write(path, result):
    with as_user_error(f"--out={path} cannot be written"):
        write_atomically(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command_line.run(main)

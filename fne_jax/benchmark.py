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
from fne_jax.benchmarks import cases, frozen, retrieval, search, step, step_comparison
from fne_jax.benchmarks import input as input_benchmark
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, write_atomically
from fne_jax.planning.published import read_architectures
from fne_jax.planning.topology import CHIPS


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
    _add_input(commands)
    _add_retrieval(commands)
    _add_search(commands)
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


def _add_step(commands):
    parser = commands.add_parser(
        "step",
        help="a config's whole train step on one device, beside PyTorch's and its plan; config "
        "fields as --config.x=y",
    )
    parser.add_argument("--config", required=True, help="config file, e.g. configs/flickr30k.py")
    parser.add_argument("--batch", type=int, help="pairs in a batch (the config's by default)")
    parser.add_argument("--steps", type=int, default=10, help="steps in a window")
    parser.add_argument("--windows", type=int, default=5, help="timed windows in a round")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each part, in turns")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file, written after every part")
    parser.add_argument("--peak-tflops", type=float, help="of the device (its chip's by default)")
    parser.add_argument("--topology", help="of the plan (one of the device's chip by default)")
    parser.add_argument("--seconds", type=int, default=900, help="most that a part may take")
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
    parser.set_defaults(measure=lambda o: [_step(o)], overrides=())


def _add_frozen(commands):
    parser = commands.add_parser(
        "frozen",
        help="a config's train step with more and more of its encoders frozen, on one device; "
        "config fields as --config.x=y",
    )
    parser.add_argument("--config", required=True, help="config file, e.g. configs/photographs.py")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    parser.set_defaults(measure=lambda o: [_frozen(o)], overrides=())


def _frozen(options):
    config = configuration.load_config(options.config, options.overrides)
    return frozen.frozen_steps(config, read_architectures(config.encoder), options.repeats)


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
    result = step_comparison.compare(
        config,
        options.rounds,
        run_part=run_part,
        run_plan=run_plan,
        peaks={name: chip.flops for name, chip in CHIPS.items()},
        peak_flops=options.peak_tflops and options.peak_tflops * 1e12,
        topology=options.topology,
        save=save,
    )
    return result


def _part(options, config):
    if options.part == step_comparison.JAX:
        return step.jax_step(config, options.steps, options.windows)
    try:
        # PyTorch is not among what the package installs.
        from fne_jax.benchmarks.step_pytorch import pytorch_step
    except ImportError as error:
        raise UserError(f"{error}: install the extra with `pip install -e .[convert]`") from error
    precision = options.part.removeprefix("pytorch_")
    return pytorch_step(
        config, precision, options.steps, options.windows, platform=options.platform
    )


def _write(path, result):
    with as_user_error(f"--out={path} cannot be written"):
        write_atomically(path, json.dumps(result, indent=1) + "\n")


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


def _add_search(commands):
    parser = commands.add_parser("search", help="one exact query among many stored rows")
    parser.add_argument("--rows", type=int, default=1_000_000, help="stored rows")
    parser.add_argument("--dim", type=int, default=768, help="dimension")
    parser.add_argument("--repeats", type=int, default=9, help="timed queries")
    parser.set_defaults(measure=lambda o: [search.search(o.rows, o.dim, o.repeats)])


if __name__ == "__main__":
    command_line.run(main)

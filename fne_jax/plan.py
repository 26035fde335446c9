"""Plans a run on a machine: python -m fne_jax.plan --config=configs/coco.py --topology v5e:4x4.

It compiles the FNE step for the machine, which you need not have, and counts its program.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib

import jax

from fne_jax import command_line, configuration
from fne_jax.errors import UserError
from fne_jax.planning import program, published, summary, topology

# Of a run whose dataset is unknown: the program hardly depends on it.
_SOME_STEPS_PER_EPOCH = 1000
_log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Parses the command line, compiles, and prints the plan.

    Raises:
      UserError: on invalid input.
    """
    options, overrides = _parse(arguments)
    # Programs for TPUs and GPUs are compiled without any; only the CPU is to be started.
    jax.config.update("jax_platforms", "cpu")
    machine = topology.find(options.topology)
    config = configuration.load_config(options.config, overrides)
    pairs = options.pairs or published.training_pairs(pathlib.Path(options.config).stem)
    steps = None if pairs is None else max(pairs // config.global_batch_size, 1)
    _log.info("compiling for %d devices; minutes for encoders of base size", len(machine.devices))
    compiled = program.compile_step(config, machine, steps or _SOME_STEPS_PER_EPOCH)
    plan = summary.summarize(compiled, machine, pairs, steps)
    print(json.dumps(plan) if options.json else summary.render(plan))


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = command_line.parser("Says what a run would take of a machine.", "plan")
    parser.add_argument("--config", required=True, help="config file, e.g. configs/coco.py")
    parser.add_argument(
        "--topology", required=True, help="machine: v5e:4x4, v5p:2x2x1, h100:8, cpu:8, ..."
    )
    parser.add_argument("--batch", type=int, help="pairs in a batch (the config's by default)")
    parser.add_argument(
        "--pairs",
        type=int,
        help="training pairs (by default those of COCO or Flickr30K, if the config's file is "
        "named after it)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    if options.pairs is not None and options.pairs < 1:
        raise UserError(f"--pairs is {options.pairs}; expected a number above 0")
    if options.batch is not None:
        overrides = [*overrides, f"--config.global_batch_size={options.batch}"]
    return options, overrides


if __name__ == "__main__":
    command_line.run(main)

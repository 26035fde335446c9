"""What a run would take: python -m fne_jax.plan --config=configs/coco.py --topology v5e:4x4.

The FNE step is compiled for the machine, which need not be there, and its program is counted.
"""

from __future__ import annotations

import json
import logging
import pathlib

import jax

from fne_jax import command_line, configuration
from fne_jax.errors import UserError

# Training pairs of the datasets in Karpathy's splits: captions of 113,287 images of COCO (train
# and restval), and five of each of 29,000 images of Flickr30K.
PAIRS = {"coco": 566_747, "flickr30k": 145_000}
# Of a run whose dataset is unknown: the program hardly depends on it.
_SOME_STEPS_PER_EPOCH = 1000
_log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Parses the command line, compiles, and prints the plan.

    Raises:
      UserError: on wrong input.
    """
    parser = command_line.parser("Says what a run would take of a machine.", "plan")
    parser.add_argument("--config", required=True, help="config file, e.g. configs/coco.py")
    parser.add_argument(
        "--topology", required=True, help="machine: v5e:4x4, v5p:2x2x1, v6e:2x4, cpu:8, ..."
    )
    parser.add_argument("--batch", type=int, help="pairs in a batch (the config's by default)")
    parser.add_argument(
        "--pairs",
        help=f"training pairs: a number or one of {', '.join(PAIRS)} (by default the dataset that "
        "the config's file is named after)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, overrides = parser.parse_known_args(arguments)
    # Programs for TPUs are compiled without any; nothing else than the CPU is to be started.
    jax.config.update("jax_platforms", "cpu")
    from fne_jax.planning import architectures, topology

    machine = topology.find(options.topology)
    if options.batch is not None:
        overrides = [*overrides, f"--config.global_batch_size={options.batch}"]
    config = configuration.load_config(options.config, overrides)
    pairs = training_pairs(options.pairs, pathlib.Path(options.config).stem)

    from fne_jax.planning import program, report

    for tower in architectures.published_towers(config):
        _log.info("%s: architecture as published, nothing is read", tower)
    steps = None if pairs is None else max(pairs // config.global_batch_size, 1)
    _log.info("compiling for %d devices; minutes for encoders of base size", len(machine.devices))
    compiled = program.compile_step(config, machine, steps or _SOME_STEPS_PER_EPOCH)
    plan = report.summarize(compiled, machine, pairs, steps)
    print(json.dumps(plan) if options.json else report.render(plan))


def training_pairs(given: str | None, config_name: str) -> int | None:
    """Returns the number that is given, or that of the dataset named, or None.

    Args:
      given: on the command line: a number, the name of a dataset, or nothing.
      config_name: of the config's file, which may begin with the name of a dataset.

    Raises:
      UserError: if it is neither.
    """
    if given is None:
        return next((n for name, n in PAIRS.items() if config_name.startswith(name)), None)
    if given in PAIRS:
        return PAIRS[given]
    if given.isdigit() and int(given) > 0:
        return int(given)
    raise UserError(f"--pairs={given}: expected a number above 0 or one of {', '.join(PAIRS)}")


if __name__ == "__main__":
    command_line.run(main)

"""Trains a run: python -m fne_jax.train --config=configs/shapes.py --workdir=runs/shapes."""

from __future__ import annotations

import flax.linen as nn

from fne_jax import command_line, configuration, files
from fne_jax.parallel import processes
from fne_jax.training.dry_run import describe
from fne_jax.training.loop import train_and_evaluate


def main(arguments: list[str], module: nn.Module | None = None) -> None:
    """Parses the command line and trains.

    Args:
      arguments: The command line.
      module: The two towers, in place of those that the config describes.
    """
    parser = command_line.parser("Trains image-text retrieval with FNE.", "train")
    parser.add_argument("--config", required=True, help="config file, e.g. configs/shapes.py")
    parser.add_argument("--workdir", required=True, help="folder of the run; resumed if it has one")
    parser.add_argument(
        "--dry-run", action="store_true", help="print model, mesh, memory and a batch, then stop"
    )
    processes.add_arguments(parser)
    options, overrides = parser.parse_known_args(arguments)
    processes.initialize(options)
    workdir = files.local_folder(options.workdir, "--workdir")
    config = configuration.load_config(options.config, overrides)

    if options.dry_run:
        print(describe(config, workdir))
    else:
        train_and_evaluate(config, workdir, module=module)


if __name__ == "__main__":
    command_line.run(main)

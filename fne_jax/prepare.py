"""Prepares a dataset: python -m fne_jax.prepare --config=configs/shapes.py."""

from __future__ import annotations

import numpy as np

from fne_jax import command_line, configuration


def main(arguments: list[str]) -> None:
    """Parses the command line, writes the records unless they are there, and prints counts."""
    parser = command_line.parser("Packs a dataset into ArrayRecord files.", "prepare")
    parser.add_argument("--config", required=True, help="config file, e.g. configs/shapes.py")
    options, overrides = parser.parse_known_args(arguments)
    config = configuration.load_config(options.config, overrides)

    from fne_jax.data.datasets import SPLITS, load_split

    for split in SPLITS:
        dataset = load_split(config.data, config.encoder.image.image_size, split)
        print(f"{split:6}{len(dataset.image_id):9,} images {len(dataset.captions):9,} captions")
    if dataset.truth is not None:
        truth = dataset.truth.matrix()
        images = np.arange(len(truth))[:, None]
        unlabelled = truth & (images != dataset.caption_image)
        share = unlabelled.sum() / (truth.size - len(dataset.captions))
        print(f"false negatives: {share:.2%} of the unlabelled test pairs are true matches")


if __name__ == "__main__":
    command_line.run(main)

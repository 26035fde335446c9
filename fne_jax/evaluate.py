"""Evaluates a run's checkpoint, or pretrained towers as they come.

python -m fne_jax.evaluate --workdir=runs/shapes
python -m fne_jax.evaluate --init=pretrained --config=configs/flickr30k_siglip.py
"""

from __future__ import annotations

import argparse
import logging
import pathlib
from typing import TYPE_CHECKING

from fne_jax import command_line, configuration
from fne_jax.errors import UserError

if TYPE_CHECKING:
    from fne_jax.training.run import RestoredRun

_log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Parses the command line, evaluates, prints the table and writes the report."""
    parser = command_line.parser("Evaluates a checkpoint on a split.", "evaluate")
    parser.add_argument("--workdir", help="folder of the run")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--split", default="test", help="train, val or test")
    parser.add_argument(
        "--init", choices=["pretrained"], help="score the pretrained towers of --config, untrained"
    )
    parser.add_argument("--config", help="with --init; --config.x=y overrides its fields")
    parser.add_argument(
        "--out", help="report of --init (a run's is eval_<split>.json in its folder)"
    )
    options, overrides = parser.parse_known_args(arguments)
    evaluated, path = _what_to_evaluate(options, overrides)

    from fne_jax.data.datasets import load_split, with_captions_per_image
    from fne_jax.retrieval import evaluation
    from fne_jax.training import run

    config = evaluated.config
    dataset = with_captions_per_image(
        load_split(config.data, config.encoder.image.image_size, options.split),
        config.evaluation.captions_per_image,
    )
    tokens = run.tokenize_captions(
        config, evaluated.tokenizer, dataset.captions, config.evaluation.text_length
    )
    embedder = run.build_embedder(config, evaluated.module, evaluated.mesh)
    embeddings = evaluation.embed_split(embedder, evaluated.params, dataset, tokens)
    metrics = evaluation.split_metrics(*embeddings, dataset)
    about = {
        "split": options.split,
        "step": evaluated.step,
        "images": len(dataset.image_id),
        "captions": len(dataset.captions),
    }
    print(
        f"step {about['step']}, {options.split}: "
        f"{about['images']} images, {about['captions']} captions\n"
    )
    print(evaluation.format_table(metrics))
    if path is not None:
        evaluation.write_report(path, metrics, about)
        print(f"\nwritten to {path}")
    if evaluated.state is not None:
        _write_page(path.parent, evaluated, dataset, embeddings, metrics, options.split)


def _write_page(workdir, evaluated, dataset, embeddings, metrics, split):
    try:
        from fne_jax.report.run_report import write_run_report
    except ImportError as error:
        _log.warning("no report.html: pip install %s", error.name)
        return
    print(
        f"written to {write_run_report(workdir, evaluated, dataset, *embeddings, metrics, split)}"
    )


def _what_to_evaluate(
    options: argparse.Namespace, overrides: list[str]
) -> tuple[RestoredRun, pathlib.Path | None]:
    """Returns the model, and the file to report into."""
    from fne_jax.training import run

    if options.init is None:
        for name in ("config", "out"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} goes with --init=pretrained; a run keeps its own")
        if overrides:
            raise UserError(f"unknown argument {overrides[0]!r}; see --help")
        if options.workdir is None:
            raise UserError("give the --workdir of a run, or --init=pretrained and a --config")
        workdir = pathlib.Path(options.workdir)
        restored = run.restore_run(workdir, options.checkpoint)
        return restored, workdir / f"eval_{options.split}.json"
    if options.workdir is not None or options.config is None:
        raise UserError("--init=pretrained takes a --config and no --workdir")
    config = configuration.load_config(options.config, overrides)
    return run.pretrained_run(config), None if options.out is None else pathlib.Path(options.out)


if __name__ == "__main__":
    command_line.run(main)

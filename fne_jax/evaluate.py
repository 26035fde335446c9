"""Evaluates a run's checkpoint: python -m fne_jax.evaluate --workdir=runs/shapes."""

from __future__ import annotations

import pathlib

from fne_jax import command_line


def main(arguments: list[str]) -> None:
    """Parses the command line, evaluates, prints the table and writes eval_<split>.json."""
    parser = command_line.parser("Evaluates a checkpoint on a split.", "evaluate")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--split", default="test", help="train, val or test")
    options = parser.parse_args(arguments)

    from fne_jax.data.datasets import load_split
    from fne_jax.retrieval import evaluation
    from fne_jax.training import run

    workdir = pathlib.Path(options.workdir)
    restored = run.restore_run(workdir, options.checkpoint)
    config = restored.config
    dataset = load_split(config.data, config.encoder.image.image_size, options.split)
    tokens = run.tokenize_split(config, restored.tokenizer, dataset)
    embedder = run.build_embedder(config, restored.module, restored.mesh)
    metrics, _ = evaluation.evaluate_split(embedder, restored.state.params, dataset, tokens)
    about = {
        "split": options.split,
        "step": int(restored.state.step),
        "images": len(dataset.image_id),
        "captions": len(dataset.captions),
    }
    path = workdir / f"eval_{options.split}.json"
    evaluation.write_report(path, metrics, about)
    print(
        f"step {about['step']}, {options.split}: "
        f"{about['images']} images, {about['captions']} captions\n"
    )
    print(evaluation.format_table(metrics))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    command_line.run(main)

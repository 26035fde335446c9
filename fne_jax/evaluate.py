"""Evaluates a run's checkpoint, pretrained towers as they come, or anyone's embeddings.

python -m fne_jax.evaluate --workdir=runs/shapes
python -m fne_jax.evaluate --init=pretrained --config=configs/flickr30k_siglip.py
python -m fne_jax.evaluate --embeddings=DIR --protocol=all
"""

from __future__ import annotations

import argparse
import logging
import pathlib
from typing import Any

import jax

from fne_jax import command_line, configuration
from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import Model, pretrained_model, restore_model
from fne_jax.parallel import processes
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.retrieval import embedding_files, evaluation, protocols

# Where the model comes from; the options that each of these takes.
_SOURCES = {
    "workdir": {"checkpoint", "split", "weights"},
    "init": {"config", "out", "split"},
    "embeddings": {"out"},
}

_log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Parses the command line, evaluates, prints the table and writes the report."""
    parser = command_line.parser("Evaluates a checkpoint on a split.", "evaluate")
    parser.add_argument("--workdir", help="folder of the run")
    parser.add_argument("--checkpoint", help="of the run: best (by default), latest or a step")
    parser.add_argument(
        "--weights", choices=["online", "momentum"], help="of the run's encoders (online)"
    )
    parser.add_argument("--split", help="train, val or test (by default)")
    parser.add_argument(
        "--init", choices=["pretrained"], help="score the pretrained towers of --config, untrained"
    )
    parser.add_argument("--config", help="with --init; --config.x=y overrides its fields")
    parser.add_argument("--embeddings", help="folder of embeddings, as --dump writes, to score")
    parser.add_argument(
        "--out",
        help="report of --init or --embeddings (a run's is eval_<split>.json in its folder)",
    )
    parser.add_argument(
        "--protocol",
        choices=[*protocols.PROTOCOLS, protocols.ALL],
        default="flickr30k",
        help="flickr30k: the whole split (by default); all: each that the split allows",
    )
    parser.add_argument("--dump", help="folder to write embeddings, ids and top-50 lists into")
    processes.add_arguments(parser)
    options, overrides = parser.parse_known_args(arguments)
    source = _source(options, overrides)
    processes.initialize(options)

    if source == "embeddings":
        split, dataset = embedding_files.read_embeddings(pathlib.Path(options.embeddings)), None
        protocols.check_suits(options.protocol, split.image_id, split.caption_id)
        about = {"embeddings": options.embeddings}
        path = _out(options)
    else:
        evaluated, path = _model(options, overrides)
        split, dataset, about = _embedded(evaluated, options)
    if jax.process_index() == 0:
        measured = _report(split, dataset, about, path, options)
        # The page is about the weights that the run goes by.
        if source == "workdir" and about["weights"] == "online":
            _write_page(path.parent, evaluated, dataset, split, measured, about["split"])


def _write_page(workdir, evaluated, dataset, split, measured, name):
    try:
        from fne_jax.report.run_report import write_run_report
    except ImportError as error:
        _log.warning("no report.html: pip install %s", error.name)
        return
    metrics = {key: one.as_json() for key, one in measured.items()}
    embeddings = split.image_emb, split.text_emb
    path = write_run_report(workdir, evaluated, dataset, *embeddings, metrics, name)
    print(f"written to {path}")


def _source(options: argparse.Namespace, overrides: list[str]) -> str:
    """Returns the key of `_SOURCES` that the options name."""
    given = {name for name, value in vars(options).items() if value is not None}
    sources = [name for name in _SOURCES if name in given]
    if len(sources) != 1:
        raise UserError(
            "give one of the --workdir of a run, --init=pretrained with a --config, or the folder "
            "of --embeddings"
        )
    source = sources[0]
    for name in sorted(given & set().union(*_SOURCES.values()) - _SOURCES[source]):
        owners = " or ".join(f"--{other}" for other in _SOURCES if name in _SOURCES[other])
        raise UserError(f"--{name} goes with {owners}, not with --{source}")
    if source == "init" and options.config is None:
        raise UserError("--init=pretrained takes a --config")
    if source != "init" and overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; see --help")
    return source


def _model(options: argparse.Namespace, overrides: list[str]) -> tuple[Model, pathlib.Path | None]:
    """Returns the model, and the file to report into."""
    if options.init is not None:
        config = configuration.load_config(options.config, overrides)
        return pretrained_model(config), _out(options)
    workdir = pathlib.Path(options.workdir)
    suffix = "_momentum" if options.weights == "momentum" else ""
    path = workdir / f"eval_{options.split or 'test'}{suffix}.json"
    return restore_model(workdir, options.checkpoint or "best"), path


def _out(options):
    return None if options.out is None else pathlib.Path(options.out)


def _embedded(
    model: Model, options: argparse.Namespace
) -> tuple[EmbeddedSplit, PairDataset, dict[str, Any]]:
    """Returns a split as the model embeds it, the split itself, and what the report says of it."""
    name, weights = options.split or "test", options.weights or "online"
    use_compile_cache(model.config.compile_cache)
    dataset = model.load_split(name)
    protocols.check_suits(options.protocol, dataset.image_id, dataset.caption_id)
    split = (model.momentum() if weights == "momentum" else model).embed_split(dataset)
    return split, dataset, {"split": name, "step": model.step, "weights": weights}


def _report(split, dataset, about, path, options):
    """Writes the dump, prints the table and writes the report; returns what was measured."""
    if options.dump is not None:
        embedding_files.write_embeddings(pathlib.Path(options.dump), split, dataset)
    measured, left_out = protocols.measure(split, options.protocol)
    about |= {"images": len(split.image_emb), "captions": len(split.text_emb)}
    where = f"step {about['step']}, {about['split']}" if "step" in about else about["embeddings"]
    print(f"{where}: {about['images']} images, {about['captions']} captions\n")
    print(evaluation.format_table(measured))
    if left_out:
        print("\nleft out: " + "\n          ".join(left_out.values()))
    if options.dump is not None:
        print(f"\nembeddings written to {options.dump}")
    if path is not None:
        evaluation.write_report(path, measured, about)
        print(f"\nwritten to {path}")
    return measured


if __name__ == "__main__":
    command_line.run(main)

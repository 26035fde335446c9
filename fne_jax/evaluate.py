"""Evaluates a run's checkpoint, a published CLIP or SigLIP, or any model's embeddings.

python -m fne_jax.evaluate --workdir=runs/shapes
python -m fne_jax.evaluate --model=openai/clip-vit-base-patch32 --config=configs/flickr30k.py
python -m fne_jax.evaluate --embeddings=DIR --protocol=all
python -m fne_jax.evaluate --embeddings=DIR --config=configs/flickr30k.py --report=theirs.html
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import pathlib
from typing import Any

import jax

from fne_jax import command_line, configuration
from fne_jax.data.identity import FILE_NAME as IDENTITY_FILE
from fne_jax.data.pairs import few_images
from fne_jax.errors import UserError
from fne_jax.evaluation import embedding_files, protocols, results
from fne_jax.false_negatives import judged_evaluation, verdict_judges
from fne_jax.false_negatives.judged_split import judged_by_embeddings
from fne_jax.false_negatives.verdict_store import read_any
from fne_jax.files import as_user_error, check_writable, folder_name
from fne_jax.logs import warn_once
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import load_workdir, pretrained_model
from fne_jax.parallel import processes
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.training import metric_log

# Where the model comes from; the options that each of these takes.
_SOURCES = {
    "workdir": {"checkpoint", "split", "weights"},
    "model": {"config", "split"},
    "embeddings": {"config", "split"},
}
# What names no file of its own: the evaluation that a run is known by.
_USUAL = {"split": "test", "checkpoint": "best", "weights": "online"}

_log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Parses the command line, evaluates, prints the table and writes the report."""
    options, overrides = _parse(arguments)
    source = _source(options, overrides)
    json_path, page_path = _paths(options)
    processes.initialize(options)
    of = {"workdir": _of_run, "model": _of_published, "embeddings": _of_embeddings}[source]
    split, about = of(options, overrides)
    if jax.process_index() == 0:
        measured = _report(split, about, json_path, options)
        if page_path is not None:
            _write_page(page_path, split, measured, options)
        if source == "workdir" and "t2i_r1" in measured:  # not with a protocol of folds alone
            values = {name: one.value for name, one in measured.items()}
            log = metric_log.read_metrics(pathlib.Path(options.workdir))
            print("", *results.what_was_learnt(values, log, len(split.image_emb)), sep="\n")


def _parse(arguments):
    parser = command_line.parser("Evaluates a checkpoint on a split.", "evaluate")
    parser.add_argument(
        "--workdir",
        help="folder of the run; --config.data.dir=DIR tells where its data lie now",
    )
    parser.add_argument("--checkpoint", help="of the run: best (by default), latest or a step")
    parser.add_argument(
        "--weights", choices=["online", "momentum"], help="of the run's encoders (online)"
    )
    parser.add_argument("--split", help="train, val or test (by default)")
    parser.add_argument(
        "--model", help="a CLIP or SigLIP on the Hugging Face hub or in a folder, to score as it is"
    )
    parser.add_argument(
        "--config",
        help="of the data of --model or --embeddings; --config.x=y overrides its fields",
    )
    parser.add_argument("--embeddings", help="folder of embeddings, as --dump writes, to score")
    parser.add_argument(
        "--out",
        help="JSON to write; by default eval_<split>.json in the run's folder, or named after the "
        "options, as eval_test_latest.json",
    )
    parser.add_argument(
        "--report",
        help="HTML page to write; by default report.html in the run's folder, or report_val.html "
        "and so on",
    )
    parser.add_argument(
        "--protocol",
        choices=[*protocols.PROTOCOLS, protocols.ALL],
        default="flickr30k",
        help="flickr30k: the whole split (by default); all: each that the split allows",
    )
    parser.add_argument("--dump", help="folder to write embeddings and ids into")
    parser.add_argument(
        "--verdicts",
        metavar="FILE",
        help="people's verdicts on the first results of random queries, to score by as well: the "
        ".sqlite, .csv or .jsonl of `review --for-evaluation`",
    )
    parser.add_argument("--sample", help="which of the samples that --verdicts are of")
    processes.add_arguments(parser)
    options, overrides = command_line.parse_with_overrides(parser, arguments)
    command_line.expand_home(
        options, "workdir", "model", "embeddings", "dump", "out", "report", "config", "verdicts"
    )
    if options.sample is not None and options.verdicts is None:
        raise UserError("--sample goes with --verdicts")
    if options.verdicts is not None and not os.path.isfile(options.verdicts):
        raise UserError(f"--verdicts={options.verdicts} is not a file")
    return options, overrides


def _source(options: argparse.Namespace, overrides: list[str]) -> str:
    """Returns the key of `_SOURCES` that the options name."""
    given = {name for name, value in vars(options).items() if value is not None}
    sources = [name for name in _SOURCES if name in given]
    if len(sources) != 1:
        raise UserError(
            "give one of the --workdir of a run, a --model with a --config, or the folder of "
            "--embeddings"
        )
    source = sources[0]
    for name in sorted(given & set().union(*_SOURCES.values()) - _SOURCES[source]):
        owners = " or ".join(f"--{other}" for other in _SOURCES if name in _SOURCES[other])
        raise UserError(f"--{name} goes with {owners}, not with --{source}")
    if source == "model" and options.config is None:
        raise UserError("--model takes the --config of the data")
    if source == "embeddings" and options.config is None and overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; see --help")
    if source == "embeddings" and options.config is None and options.verdicts is not None:
        raise UserError("--verdicts with --embeddings takes the --config of their data")
    if source == "embeddings" and options.config is None and options.split is not None:
        raise UserError("--split goes with --embeddings beside the --config of their data")
    return source


def _paths(options: argparse.Namespace) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """Returns the files to write the metrics and the page into, each None for nowhere.

    Raises:
      UserError: if there is no folder for one of them, or one would overwrite another or what is
        read.
    """
    out, page = (_path(name, getattr(options, name)) for name in ("out", "report"))
    read = [options.verdicts, options.config]
    if options.workdir is not None:
        names = (configuration.FILE_NAME, IDENTITY_FILE, metric_log.FILE_NAME)
        read += [os.path.join(options.workdir, name) for name in names]
    inputs = {os.path.realpath(path) for path in read if path is not None}
    for name, path in (("out", out), ("report", page)):
        if path is not None and os.path.realpath(path) in inputs:
            raise UserError(f"--{name}={path} is a file that the evaluation reads; give another")
    _check_dump(options.dump, options.embeddings)
    if options.workdir is None:
        return _checked(out, page)
    workdir = pathlib.Path(options.workdir)
    name = _evaluation_name(options)
    if page is None and options.weights != "momentum":
        # The statistics and the learning curves are of the weights that the run goes by.
        page = workdir / ("report.html" if name == _USUAL["split"] else f"report_{name}.html")
        page = page if out is None else out.with_suffix(".html")
    return _checked(out or workdir / f"eval_{name}.json", page)


def _check_dump(dump: str | None, embeddings: str | None) -> None:
    if dump is None:
        return
    check_writable(pathlib.Path(dump), "--dump", folder=True)
    if embeddings is not None and os.path.realpath(dump) == os.path.realpath(embeddings):
        raise UserError(f"--dump={dump} is the folder of --embeddings; give another")


def _checked(out, page):
    if out is not None and page is not None and os.path.realpath(out) == os.path.realpath(page):
        raise UserError(f"{out} cannot hold both the metrics (--out) and the page (--report)")
    for flag, path in (("--out", out), ("--report", page)):
        if path is not None:
            check_writable(path, flag)
    return out, page


def _path(option: str, value: str | None) -> pathlib.Path | None:
    if value is None:
        return None
    path = pathlib.Path(value)
    if not path.parent.is_dir():
        raise UserError(f"--{option}={value} cannot be written: {path.parent} is not a folder")
    return path


def _chosen(options: argparse.Namespace) -> dict[str, str]:
    """Returns the options of `_USUAL`, as they are given or by default."""
    given = {name: getattr(options, name) for name in _USUAL}
    return _USUAL | {name: value for name, value in given.items() if value is not None}


def _evaluation_name(options: argparse.Namespace) -> str:
    """Returns the split and whatever is not the default: `test`, `val_latest`, `test_step40`."""
    chosen = _chosen(options)
    if chosen["checkpoint"].isdecimal():
        chosen["checkpoint"] = f"step{int(chosen['checkpoint'])}"
    rest = [value for name, value in chosen.items() if value != _USUAL[name] and name != "split"]
    return "_".join([chosen["split"], *rest])


def _of_run(
    options: argparse.Namespace, overrides: list[str]
) -> tuple[EmbeddedSplit, dict[str, Any]]:
    """Returns a split as a run embeds it, and what the report says of it."""
    workdir = pathlib.Path(options.workdir)
    chosen = _chosen(options)
    model = load_workdir(workdir, chosen["checkpoint"], overrides=overrides)
    weights = chosen["weights"]
    model = model.momentum() if weights == "momentum" else model
    return _embedded(model, folder_name(workdir), weights, options)


def _of_published(options, overrides):
    """Returns the same of a CLIP or SigLIP, with captions and pixels as it was trained on."""
    with as_user_error(f"--model={options.model}", errors=UserError):
        fields = configuration.overrides_of_pair(options.model)
    model = pretrained_model(configuration.load_config(options.config, [*fields, *overrides]))
    name = pathlib.Path(options.model).name
    split, about = _embedded(model, name, "online", options)
    return dataclasses.replace(split, step=None), about


def _embedded(model, name, weights, options):
    split_name = _chosen(options)["split"]
    use_compile_cache(model.config.compile_cache)
    dataset = model.load_evaluation_split(split_name)
    warn_once(_log, few_images(split_name, len(dataset.image_id)))
    warn_once(_log, model.unread(dataset.captions))
    protocols.check_suits(options.protocol, dataset.image_id, dataset.caption_id)
    split = dataclasses.replace(model.embed_split(dataset), name=name, split_name=split_name)
    return split, {"name": name, "split": split_name, "step": model.step, "weights": weights}


def _of_embeddings(options, overrides):
    """Returns the same of a folder of embeddings."""
    folder = pathlib.Path(options.embeddings)
    name = folder.resolve().name
    about = {"name": name, "embeddings": options.embeddings}
    if options.config is None:
        split = dataclasses.replace(embedding_files.read_embeddings(folder), name=name)
    else:
        config = configuration.load_config(options.config, overrides)
        config = configuration.with_model_defaults(config, {})  # no encoder of it is needed
        split = judged_by_embeddings(folder, config, _chosen(options)["split"])
        about["split"] = split.split_name
    protocols.check_suits(options.protocol, split.image_id, split.caption_id)
    return split, about


def _report(split: EmbeddedSplit, about, path: pathlib.Path | None, options: argparse.Namespace):
    """Writes the dump, prints the table and writes the report; returns what was measured."""
    judged = {} if options.verdicts is None else _judged(split, about, options)
    if options.dump is not None:
        embedding_files.write_embeddings(pathlib.Path(options.dump), split)
    measured, left_out = protocols.measure(split, options.protocol)
    measured |= judged
    about |= {"images": len(split.image_emb), "captions": len(split.text_emb)}
    if split.dataset is not None:
        about["data"] = dataclasses.asdict(split.dataset.identity)
    where = f"step {about['step']}, {about['split']}" if "step" in about else about["embeddings"]
    print(f"{where}: {about['images']} images, {about['captions']} captions\n")
    print(results.format_table(measured))
    if left_out:
        print("\nleft out: " + "\n          ".join(left_out.values()))
    if options.dump is not None:
        print(f"\nembeddings written to {options.dump}")
    if path is not None:
        results.write_report(path, measured, about)
        print(f"\nwritten to {path}")
    return measured


def _judged(split, about, options) -> dict[str, protocols.Measurement]:
    """Returns the metrics by verdicts, and notes in the report what they are of."""
    path = pathlib.Path(options.verdicts)
    verdicts = read_any(path, split.dataset, split.split_name)
    with as_user_error(f"--verdicts={path}", errors=UserError):
        sample = judged_evaluation.find_sample(verdicts, options.sample)
        measured = judged_evaluation.measure_judged(sample, split, verdicts)
    asked = {one.pair for one in verdicts if one.sample == sample.name}
    used = [dataclasses.replace(one, weight=None) for one in verdicts if one.pair in asked]
    reviewers = verdict_judges.reviewers(used)
    print(verdict_judges.describe(reviewers))
    about["verdicts"] = {"sample": sample.name, "number": len(used), "reviewers": reviewers}
    return measured


def _write_page(path: pathlib.Path, split: EmbeddedSplit, measured, options) -> None:
    try:
        # Kept out of the module's imports: matplotlib and Jinja2 may be missing.
        from fne_jax.report.run_report import write_run_report
    except ImportError as error:
        _log.warning("no %s: pip install %s", path.name, error.name)
        return
    metrics, of_run = {key: dataclasses.asdict(one) for key, one in measured.items()}, {}
    if options.workdir is not None:
        of_run["weights"] = _chosen(options)["weights"]
        of_run["log"] = metric_log.read_metrics(pathlib.Path(options.workdir))
    elif options.model is not None:
        of_run["weights"] = "online"
    write_run_report(path, split, metrics, **of_run)
    print(f"written to {path}")


if __name__ == "__main__":
    command_line.run(main)

"""Serves a page on this machine, to search a split and judge its suspects.

python -m fne_jax.review --workdir=runs/shapes --split=train
python -m fne_jax.review --workdir=runs/shapes --split=train --labels
python -m fne_jax.review --workdir=runs/shapes --export=verdicts.csv
python -m fne_jax.review --workdir=runs/shapes --import=verdicts.jsonl
python -m fne_jax.review --workdir=runs/shapes --sample=1000
python -m fne_jax.review --workdir=runs/shapes --sample=1000 --questions=questions.jsonl
python -m fne_jax.review --for-evaluation runs/a runs/b runs/c --split=test
"""

from __future__ import annotations

import argparse
import getpass
import os
import pathlib
import random
import socket
from typing import Any

from fne_jax import command_line
from fne_jax.data import verdicts as verdicts_lib
from fne_jax.errors import Interrupted, UserError, needs_extra
from fne_jax.false_negatives import suspect_options, suspects, wrong_labels
from fne_jax.false_negatives.judged_evaluation import FIRST, EvaluationSample
from fne_jax.false_negatives.judged_split import judged_by_model
from fne_jax.false_negatives.review_app import question_sources
from fne_jax.false_negatives.review_app.question_files import write_questions
from fne_jax.false_negatives.review_app.questions import Answers, Questions
from fne_jax.false_negatives.verdict_store import VerdictStore, store_path
from fne_jax.files import check_writable, folder_name
from fne_jax.model.model import load_workdir, stored_model
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.training.interruption import stop_signals


def main(arguments: list[str]) -> None:
    """Parses the command line; exports, imports, writes questions, or serves until a signal."""
    options, overrides = _parse(arguments)
    workdir = pathlib.Path(options.workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give the --workdir of a run")
    path = store_path(workdir) if options.store is None else pathlib.Path(options.store)
    if options.export is None:
        check_writable(path, "--store")
    if options.export is not None:
        _export(path, pathlib.Path(options.export))
    elif options.import_ is not None:
        _import(path, pathlib.Path(options.import_), workdir, overrides)
    elif options.questions is not None:
        _write_questions(options, overrides, workdir, path)
    else:
        _serve(options, overrides, workdir, path)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = command_line.parser("Serves a page to search a split and judge suspects.", "review")
    parser.add_argument(
        "--workdir",
        help="folder of the run whose model judges; --config.data.dir=DIR tells where its data lie "
        "now",
    )
    parser.add_argument("--checkpoint", default="best", help="best (by default), latest or a step")
    parser.add_argument("--split", default="train", help="train (by default), val or test")
    parser.add_argument(
        "--reviewer", default=_login_name(), help="your name; by default your login"
    )
    parser.add_argument(
        "--store",
        metavar="FILE.sqlite",
        help="where the verdicts are; reviews/verdicts.sqlite in the run's folder by default",
    )
    parser.add_argument("--export", metavar="FILE", help="write all verdicts to a .csv or .jsonl")
    parser.add_argument(
        "--import",
        metavar="FILE",
        dest="import_",
        help="add the verdicts of a .csv or .jsonl, or the answers to --questions",
    )
    parser.add_argument(
        "--questions",
        metavar="FILE.jsonl",
        help="instead of serving, write the questions that --reviewer has not answered, for others "
        "to ask; --import takes the answers",
    )
    parser.add_argument(
        "--images-dir", metavar="DIR", help="with --questions: write their images into this folder"
    )
    parser.add_argument(
        "--for-evaluation",
        nargs="+",
        metavar="RUN",
        help="instead of suspects, judge blindly what these systems find first for random queries: "
        "folders of runs or, except for the first, of embeddings",
    )
    parser.add_argument(
        "--first",
        type=int,
        choices=FIRST,
        default=1,
        help="with --for-evaluation: judge the first result, for R@1, or ten, for P@10 as well",
    )
    parser.add_argument(
        "--queries", type=int, default=200, help="with --for-evaluation: how many each way (200)"
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="COUNT",
        help="instead of suspects, judge so many random pairs, the hardest far more often than "
        "others, for `audit --verdicts`",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="with --for-evaluation or --sample: of what is drawn"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; by default 127.0.0.1, reachable only from this machine",
    )
    parser.add_argument("--port", type=int, help="port to listen on; by default one that is free")
    suspect_options.add_arguments(parser)
    options, overrides = command_line.parse_with_overrides(parser, arguments)
    command_line.expand_home(
        options,
        "workdir",
        "store",
        "export",
        "import_",
        "questions",
        "images_dir",
        "caption_embeddings",
        "fitted",
        "for_evaluation",
    )
    _check(options)
    if overrides and options.export is not None:
        raise UserError(f"{overrides[0]} does not go with --export, which reads no data")
    return options, overrides


def _check(options: argparse.Namespace) -> None:
    suspect_options.check(options)
    if options.for_evaluation is not None:
        options.workdir = options.workdir or options.for_evaluation[0]
    if options.workdir is None:
        raise UserError("give the --workdir of a run, or runs to compare --for-evaluation")
    modes = [options.export, options.import_, options.for_evaluation, options.sample]
    if sum(mode is not None for mode in modes) > 1:
        raise UserError("give one of --export, --import, --for-evaluation and --sample")
    if options.questions is not None and (options.export or options.import_) is not None:
        raise UserError("--questions does not go with --export or --import")
    if options.questions is not None and not options.questions.endswith(".jsonl"):
        raise UserError(f"--questions={options.questions}: expected a name that ends in .jsonl")
    if options.images_dir is not None and options.questions is None:
        raise UserError("--images-dir goes with --questions")
    if options.store is not None and pathlib.Path(options.store).suffix != ".sqlite":
        raise UserError(f"--store={options.store}: expected a file that ends in .sqlite, by "
                        "which `audit` and `evaluate` know it")  # fmt: skip
    if options.sample is not None and not 1 <= options.sample < 10**6:
        raise UserError(f"--sample is {options.sample}; expected 1 to 999999 pairs")
    if options.port is not None and not 0 <= options.port <= 65535:
        raise UserError(f"--port is {options.port}; expected 0 to 65535, 0 for any that is free")
    if not options.reviewer.strip():
        raise UserError("--reviewer is empty; expected a name")
    for name, least in (("queries", 1), ("seed", 0)):
        if not least <= getattr(options, name) < 10**9:
            raise UserError(f"--{name} is {getattr(options, name)}; expected {least} to 999999999")


def _login_name():
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without users
        return "reviewer"


def _export(store: pathlib.Path, path: pathlib.Path) -> None:
    with VerdictStore(store, read_only=True) as verdicts:
        found = verdicts.last()
    verdicts_lib.write_verdicts(path, found)
    print(f"{len(found):,} verdicts written to {path}")


def _import(
    store: pathlib.Path, path: pathlib.Path, workdir: pathlib.Path, overrides: list[str]
) -> None:
    read = verdicts_lib.read_verdicts(path)
    model = stored_model(workdir, overrides=overrides)
    found: list[verdicts_lib.Verdict] = []
    # Checked before any is in the store.
    for split in sorted({verdict.split for verdict in read}):
        of_split = [verdict for verdict in read if verdict.split == split]
        found += verdicts_lib.on_pairs_of(model.load_split(split), of_split, path, refuse=True)
    if os.path.exists(store) and os.path.getsize(store):
        with VerdictStore(store, read_only=True) as verdicts:
            found = verdicts.as_asked(found)
    _refuse_unasked(found, path, store)
    with VerdictStore(store) as verdicts:
        added = verdicts.import_verdicts(found)
    there = len(found) - added
    print(f"{added:,} verdicts added to {store}, {there:,} were there or are older than what is")


def _refuse_unasked(found, path, store):
    """Raises UserError if answers to a random sample would lose the weights that it gave them."""
    unasked = [
        one
        for one in found
        if one.sample and one.weight is None and EvaluationSample.of_name(one.sample) is None
    ]
    if unasked:
        one = unasked[0]
        raise UserError(
            f"{path}: {len(unasked):,} of {len(found):,} answers are on pairs that no sample of "
            f"{store} asked about, such as caption {one.caption_id} with image {one.image_id} of "
            f"{one.sample!r}; import them into the --store that --questions was given"
        )


def _serve(
    options: argparse.Namespace, overrides: list[str], workdir: pathlib.Path, path: pathlib.Path
) -> None:
    with needs_extra("review", "review"):
        from fne_jax.false_negatives.review_app import serving
        from fne_jax.false_negatives.review_app.app import Review, create_app
    with serving.bind(options.host, options.port) as bound:
        asked = _asked(options, overrides, workdir, path)
        with VerdictStore(path) as store:
            review = Review(
                **asked,
                split=options.split,
                store=store,
                reviewer=options.reviewer.strip(),
            )
            stored = store.last(options.split)
            before = len(verdicts_lib.on_pairs_of(review.dataset, stored, path, refuse=True))
            url = serving.address(options.host, bound)

            def tell() -> None:
                counted = f"{len(review.questions):,} pairs to judge, {before:,} verdicts in {path}"
                print(f"{review.about}\n{counted}\nopen {url} (Ctrl-C ends it)", flush=True)

            app = create_app(review, {options.host, socket.gethostname()})
            signal_number = serving.serve(app, bound, stop_signals(), tell)
            there = len(store.last(options.split))
    raise Interrupted(
        signal_number,
        f"stopped; {there:,} verdicts on {options.split} are in {path}",
    )


def _write_questions(
    options: argparse.Namespace, overrides: list[str], workdir: pathlib.Path, path: pathlib.Path
) -> None:
    target, images = pathlib.Path(options.questions), options.images_dir
    check_writable(target, "--questions")
    if images is not None:
        images = pathlib.Path(images)
        check_writable(images, "--images-dir", folder=True)
    asked, reviewer = _asked(options, overrides, workdir, path), options.reviewer.strip()
    dataset, questions = asked["dataset"], asked["questions"]
    with VerdictStore(path) as store:
        stored = verdicts_lib.on_pairs_of(dataset, store.last(options.split), path, refuse=True)
        answers = Answers(questions, stored, reviewer)
        left = [one for one in questions if answers.of[one.caption, one.image].own is None]
        if options.sample is options.for_evaluation is None:
            # Suspects stand by rank, which would tell.
            random.Random(options.seed).shuffle(left)
        write_questions(target, images, left, dataset, options.split, store)
    print(asked["about"])
    answered = len(questions) - len(left)
    print(f"{len(left):,} questions written to {target}; {reviewer} has answered {answered:,} more")


def _asked(
    options: argparse.Namespace, overrides: list[str], workdir: pathlib.Path, path: pathlib.Path
) -> dict[str, Any]:
    """Returns the fields of a review that tell what it is about."""
    if os.path.exists(path) and os.path.getsize(path):
        # What is wrong with it is told before anything slow; a new one is made once all is right.
        VerdictStore(path).close()
    ask = _suspects if options.for_evaluation is None else _evaluation
    return ask(options, overrides, workdir)


def _suspects(
    options: argparse.Namespace, overrides: list[str], workdir: pathlib.Path
) -> dict[str, Any]:
    """Returns the fields of a review of a run's suspects, or of a sample of all pairs."""
    # Read before the split is embedded, which may take long.
    fitted = suspect_options.read_fitted(options)
    model = load_workdir(workdir, options.checkpoint, overrides=overrides)
    use_compile_cache(model.config.compile_cache)
    kept = question_sources.kept_path(workdir, options.split)
    name = folder_name(workdir)
    judged = judged_by_model(model, name, options.split, options.caption_embeddings, kept)
    judged = suspect_options.with_fitted(judged, fitted)
    if options.labels:
        found = wrong_labels.find_wrong_labels(judged)
        about = wrong_labels.describe(judged, found)
        questions = question_sources.questions_of_suspects(judged, found, options.limit)
    elif options.sample is None:
        found = suspect_options.find(options, judged)
        about = suspects.describe(judged, found, {}).replace("\n", "; ")
        questions = question_sources.questions_of_suspects(judged, found, options.limit)
    else:
        questions = question_sources.questions_of_sample(judged, options.sample, options.seed)
        about = f"a random sample of {len(questions):,} pairs, seed {options.seed}"
    return {
        "title": name,
        "about": about,
        "dataset": judged.dataset,
        "questions": Questions(judged.dataset, questions),
        "embedded": judged,
        "embed_texts": model.embed_texts,
    }


def _evaluation(
    options: argparse.Namespace, overrides: list[str], workdir: pathlib.Path
) -> dict[str, Any]:
    """Returns the same for what several systems find first; a search would favour one."""
    del workdir
    sample = EvaluationSample(options.first, options.queries, options.seed)
    systems = [pathlib.Path(run) for run in options.for_evaluation]
    dataset, questions, about = question_sources.questions_for_evaluation(
        systems, options.checkpoint, options.split, sample, overrides
    )
    return {
        "title": f"evaluation of {len(systems)} systems",
        "about": about,
        "dataset": dataset,
        "questions": Questions(dataset, questions),
    }


if __name__ == "__main__":
    command_line.run(main)

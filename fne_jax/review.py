"""Serves a page on this machine, to search a split and to judge its suspects.

python -m fne_jax.review --workdir=runs/shapes --split=train
python -m fne_jax.review --workdir=runs/shapes --export=verdicts.csv
python -m fne_jax.review --workdir=runs/shapes --import=verdicts.jsonl
"""

from __future__ import annotations

import argparse
import getpass
import pathlib
import socket

from fne_jax import command_line
from fne_jax.data import verdicts as verdicts_lib
from fne_jax.data.verdict_store import VerdictStore, store_path
from fne_jax.errors import Interrupted, UserError
from fne_jax.model.model import load_evaluation_split, restore_model, stored_model
from fne_jax.parallel.compile_cache import use_compile_cache
from fne_jax.report import suspect_options, suspects
from fne_jax.training.interruption import stop_signals


def main(arguments: list[str]) -> None:
    """Parses the command line; exports, imports, or serves until a signal comes."""
    options = _parse(arguments)
    workdir = pathlib.Path(options.workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give the --workdir of a run")
    path = pathlib.Path(options.store) if options.store else store_path(workdir)
    if options.export is not None:
        _export(path, pathlib.Path(options.export))
    elif options.import_ is not None:
        _import(path, pathlib.Path(options.import_), workdir)
    else:
        _serve(options, workdir, path)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.parser("Serves a page to search a split and judge suspects.", "review")
    parser.add_argument("--workdir", required=True, help="folder of the run whose model judges")
    parser.add_argument("--checkpoint", default="best", help="best (by default), latest or a step")
    parser.add_argument("--split", default="train", help="train (by default), val or test")
    parser.add_argument(
        "--reviewer", default=_login_name(), help="who answers; by default the name of your login"
    )
    parser.add_argument(
        "--store",
        metavar="FILE.sqlite",
        help="where the verdicts are; reviews/verdicts.sqlite in the run's folder by default",
    )
    parser.add_argument("--export", metavar="FILE", help="write all verdicts to a .csv or .jsonl")
    parser.add_argument(
        "--import", metavar="FILE", dest="import_", help="add the verdicts of a .csv or .jsonl"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; by default 127.0.0.1, which this machine alone can reach",
    )
    parser.add_argument("--port", type=int, help="port to listen on; by default one that is free")
    suspect_options.add_arguments(parser)
    options = parser.parse_args(arguments)
    command_line.expand_home(options, "workdir", "store", "export", "import_", "caption_embeddings")
    suspect_options.check(options)
    if options.export is not None and options.import_ is not None:
        raise UserError("give --export or --import, not both")
    if options.port is not None and not 0 <= options.port <= 65535:
        raise UserError(f"--port is {options.port}; expected 0 to 65535, 0 for any that is free")
    if not options.reviewer.strip():
        raise UserError("--reviewer is empty; expected a name")
    return options


def _login_name():
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without users
        return "reviewer"


def _export(store: pathlib.Path, path: pathlib.Path) -> None:
    with VerdictStore(store, create=False) as verdicts:
        found = verdicts.last()
    verdicts_lib.write_verdicts(path, found)
    print(f"{len(found):,} verdicts written to {path}")


def _import(store: pathlib.Path, path: pathlib.Path, workdir: pathlib.Path) -> None:
    found = verdicts_lib.read_verdicts(path)
    config = stored_model(workdir).config
    for split in sorted({verdict.split for verdict in found}):
        # Against captions and ids, so that another dataset's verdicts are told before any is in.
        verdicts_lib.read_verdicts(path, load_evaluation_split(config, split), split)
    with VerdictStore(store) as verdicts:
        added = verdicts.import_verdicts(found)
    there = len(found) - added
    print(f"{added:,} verdicts added to {store}, {there:,} were there or are older than what is")


def _serve(options: argparse.Namespace, workdir: pathlib.Path, path: pathlib.Path) -> None:
    try:
        # Kept out of the module's imports: the extra `review` may be missing.
        from fne_jax.review_app import serving
        from fne_jax.review_app.app import Review, create_app
        from fne_jax.review_app.questions import Questions
        from fne_jax.review_app.searching import SplitSearch
        from fne_jax.review_app.suspect_questions import questions_of
    except ImportError as error:
        raise UserError(
            f"review needs {error.name}: pip install 'fne-jax[review]', or {error.name} by itself"
        ) from error
    with VerdictStore(path) as store, serving.bind(options.host, options.port) as bound:
        model = restore_model(workdir, options.checkpoint)
        use_compile_cache(model.config.compile_cache)
        judged = suspects.judged_by_model(
            model,
            workdir.resolve().name,
            options.split,
            suspect_options.caption_embeddings(options),
        )
        found = suspect_options.find(options, judged)
        review = Review(
            title=judged.name,
            about=suspects.describe(judged, found, {}).replace("\n", "; "),
            split=judged.split_name,
            dataset=judged.dataset,
            questions=Questions(judged.dataset, questions_of(judged, found, options.limit)),
            store=store,
            reviewer=options.reviewer.strip(),
            search=SplitSearch(model.embed_texts, judged.embedded),
        )
        before = len(store.last(judged.split_name))
        app = create_app(review, {options.host, socket.gethostname()})
        url = serving.address(options.host, bound)
        signal_number = serving.serve(
            app,
            bound,
            stop_signals(),
            lambda: print(
                f"{len(review.questions):,} pairs to judge, {before:,} verdicts in {path}\n"
                f"open {url} (Ctrl-C ends it)",
                flush=True,
            ),
        )
        given = len(store.last(judged.split_name))
    raise Interrupted(
        signal_number,
        f"stopped; {given:,} verdicts on {judged.split_name} are in {path}, "
        f"{given - before:,} of them new",
    )


if __name__ == "__main__":
    command_line.run(main)

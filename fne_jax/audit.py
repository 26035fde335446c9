"""Lists a dataset's likely false negatives, pairs that match but nobody labelled, or wrong labels.

python -m fne_jax.audit --workdir=runs/shapes --split=train
python -m fne_jax.audit --workdir=runs/shapes --split=train --labels
python -m fne_jax.audit --workdir=runs/shapes --split=train --matches=runs/matches.npz
python -m fne_jax.audit --workdir=runs/shapes --verdicts=verdicts.csv --fitted=fitted.json
python -m fne_jax.audit --embeddings=DIR --config=configs/flickr30k.py --split=test --out=DIR
"""

from __future__ import annotations

import pathlib

from fne_jax import command_line, configuration
from fne_jax.data import match_files
from fne_jax.data.verdicts import on_pairs_of, pairs_of
from fne_jax.errors import UserError
from fne_jax.false_negatives import (
    audit_pages,
    judged_split,
    suspect_options,
    suspects,
    verdict_fitting,
    verdict_judges,
    wrong_labels,
)
from fne_jax.false_negatives.likely_matches import LEAST_PROBABILITY
from fne_jax.false_negatives.verdict_store import VerdictStore, read_any, store_path
from fne_jax.files import check_writable, folder_name
from fne_jax.model.model import load_workdir

# Pairs of each caption and of each image that are looked at for training.
_MATCHES_PER_QUERY = 100


def main(arguments: list[str]) -> None:
    """Parses the command line, ranks the pairs and writes them."""
    options, overrides = _parse(arguments)
    fitting = options.verdicts is not None and options.fitted is not None
    folder = "labels" if options.labels else "audit"
    out = pathlib.Path(options.out or f"{options.workdir}/{folder}_{options.split}")
    if options.matches is None:
        check_writable(out, "--out", folder=True)
    else:
        check_writable(pathlib.Path(options.matches), "--matches")
    if fitting:
        check_writable(pathlib.Path(options.fitted), "--fitted")
    # Read before the split is embedded, which may take long.
    fitted = None if fitting else suspect_options.read_fitted(options)
    if options.workdir is not None:
        workdir = pathlib.Path(options.workdir)
        model = load_workdir(workdir, options.checkpoint, overrides=overrides)
        name, theirs = folder_name(workdir), options.caption_embeddings
        judged = judged_split.judged_by_model(model, name, options.split, theirs)
    else:
        config = configuration.load_config(options.config, overrides)
        config = configuration.with_model_defaults(config, {})  # no encoder of it is needed
        judged = judged_split.judged_by_embeddings(
            pathlib.Path(options.embeddings), config, options.split, options.caption_embeddings
        )
    said, verdicts = None, []
    if options.workdir is not None and store_path(workdir).exists():
        with VerdictStore(store_path(workdir), read_only=True) as store:
            verdicts = on_pairs_of(judged.dataset, store.last(options.split), store.path)
    if options.verdicts is not None:
        given = read_any(pathlib.Path(options.verdicts), judged.dataset, options.split)
        if not options.labels:
            said = verdict_fitting.said_of(judged, given)
            kinds = (
                [one for one in given if bool(one.instructions) == kind] for kind in (False, True)
            )
            by_kind = (verdict_fitting.said_of(judged, of_kind) for of_kind in kinds)
            print(verdict_fitting.describe_density(*by_kind))
        verdicts += given
    if verdicts:
        rows = pairs_of(verdicts, judged.dataset)
        labelled = judged.caption_image[rows.caption] == rows.image
        used = [one for one, own in zip(verdicts, labelled, strict=True) if own == options.labels]
        print(verdict_judges.describe(verdict_judges.reviewers(used)))
    # What is in both the run's own store and the file counts once.
    heeded = verdict_fitting.said_of(judged, verdicts, options.labels) if verdicts else None
    if options.labels:
        found = wrong_labels.find_wrong_labels(judged, heeded)
        print(wrong_labels.describe(judged, found))
        _write(out, judged, found, options.limit, {})
        return
    if fitting:
        judged = verdict_fitting.fit_and_write(judged, said, pathlib.Path(options.fitted))
    else:
        judged = suspect_options.with_fitted(judged, fitted)
    if options.matches is not None:
        print(
            suspects.write_matches(
                judged,
                options.detector,
                pathlib.Path(options.matches),
                options.per_query or _MATCHES_PER_QUERY,
                options.min_probability,
                heeded,
            )
        )
        return
    found = suspect_options.find(options, judged)
    by_fitted = fitting and found.detector == "fitted"
    measured = ""
    if said is not None:
        measured = verdict_fitting.describe_quality(judged, said, found, by_fitted)
    if heeded is not None:
        found = suspects.heed_verdicts(found, judged, heeded)
    quality = suspects.detector_quality(judged)
    print(suspects.describe(judged, found, quality))
    if measured:
        print(measured)
    _write(out, judged, found, options.limit, quality)


def _write(out, judged, found, limit, quality):
    listed = audit_pages.write_audit(out, judged, found, limit, quality)
    print(f"the first {listed:,} are in {out}: open {audit_pages.page_name(1)}")


def _parse(arguments):
    parser = command_line.parser("Lists likely false negatives, or wrong labels.", "audit")
    parser.add_argument(
        "--workdir",
        help="folder of the run whose model judges; --config.data.dir=DIR tells where its data lie "
        "now",
    )
    parser.add_argument("--checkpoint", help="of the run: best (by default), latest or a step")
    parser.add_argument(
        "--embeddings", help="folder of embeddings, as `evaluate --dump` writes, instead of a run"
    )
    parser.add_argument(
        "--config",
        help="with --embeddings: of the data, the prior and the batch; --config.x=y overrides",
    )
    parser.add_argument("--split", default="train", help="train, val or test")
    parser.add_argument(
        "--out",
        help="folder to write into; audit_<split> or labels_<split> in the run's by default",
    )
    parser.add_argument(
        "--matches",
        metavar="FILE.npz",
        help="write all pairs of at least --min-probability as a list for config.data.matches, "
        f"instead of pages; by default of probability {LEAST_PROBABILITY} or more, among "
        f"{_MATCHES_PER_QUERY} per query",
    )
    parser.add_argument(
        "--verdicts",
        metavar="FILE",
        help="first measure by people's verdicts: `review`'s store (.sqlite), or its export (.csv "
        "or .jsonl); with --fitted, fit a detector to them and write it there",
    )
    suspect_options.add_arguments(parser)
    options, overrides = command_line.parse_with_overrides(parser, arguments)
    command_line.expand_home(
        options,
        "workdir",
        "embeddings",
        "out",
        "config",
        "caption_embeddings",
        "matches",
        "fitted",
        "verdicts",
    )
    if (options.workdir is None) == (options.embeddings is None):
        raise UserError("give either the --workdir of a run or the folder of --embeddings")
    written = options.out if options.matches is None else options.matches
    if options.embeddings is not None and (options.config is None or written is None):
        raise UserError(
            "--embeddings takes the --config of the data, and --out, a folder, or --matches, a file"
        )
    if options.matches is not None and options.out is not None:
        raise UserError("--matches takes no --out, which is for pages")
    if options.matches is not None and not options.matches.endswith(match_files.SUFFIX):
        raise UserError(f"--matches={options.matches}: expected a name that ends in .npz")
    for name, given in (("checkpoint", options.embeddings), ("config", options.workdir)):
        if given is not None and getattr(options, name) is not None:
            owner = "workdir" if name == "checkpoint" else "embeddings"
            raise UserError(f"--{name} goes with --{owner}")
    if options.checkpoint is None:
        options.checkpoint = "best"
    suspect_options.check(options)
    return options, overrides


if __name__ == "__main__":
    command_line.run(main)

"""Prepares a dataset: python -m fne_jax.prepare --config=configs/shapes.py.

Every image and caption is checked; unusable ones are listed in skipped.json. The same command
continues after a stop.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import signal

import ml_collections
import numpy as np

from fne_jax import command_line, configuration
from fne_jax.data.pairs import SPLITS, PairDataset, few_images
from fne_jax.data.sources.registry import data_of, find_source
from fne_jax.errors import Interrupted, UserError
from fne_jax.files import write_atomically
from fne_jax.training.interruption import stop_signals


def main(arguments: list[str]) -> None:
    """Parses the command line, writes the records unless they exist, and prints counts."""
    parser = command_line.parser("Packs a dataset into ArrayRecord files.", "prepare")
    parser.add_argument("--config", required=True, help="config file, e.g. configs/shapes.py")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="how many work at once; all cores"
    )
    parser.add_argument(
        "--beam",
        metavar="OPTIONS",
        help="work on Apache Beam with these options, e.g. '--runner=FlinkRunner ...'; its workers "
        "must see config.data.cache_dir under the same path",
    )
    parser.add_argument(
        "--check", action="store_true", help="read what is prepared, and compare it with its notes"
    )
    options, overrides = parser.parse_known_args(arguments)
    if options.processes < 1:
        raise UserError(f"--processes is {options.processes}; expected at least 1")
    # Another machine may train.
    config = configuration.load_config(options.config, overrides)
    if find_source(config.data.source).load is not None:
        raise UserError(
            f"config.data.source is {config.data.source!r}, which is read as it is: there is "
            "nothing to prepare"
        )
    with _stopping_in_good_order():
        _prepare(config, options)


def _prepare(config: ml_collections.ConfigDict, options: argparse.Namespace) -> None:
    # Kept out of the module's imports: a mistake in the command line should not wait for them.
    from fne_jax.data.preparation import makers

    if options.beam is not None:
        maker = functools.partial(makers.by_beam, options=options.beam)
    elif options.processes > 1:
        maker = functools.partial(makers.in_processes, processes=options.processes)
    else:
        maker = functools.partial(makers.in_threads, threads=1)
    groups = {split: data_of(config.data, split) for split in SPLITS}
    for data in {(one.source, one.dir): one for one in groups.values()}.values():
        _prepare_one(config, data, maker, options.check)


def _prepare_one(config, data, maker, check):
    from fne_jax.data.preparation import preparing, storage
    from fne_jax.model import tokenizers

    prepared = preparing.prepare(data, maker)
    for split, summary in prepared.summaries.items():
        if check:
            prepared.check(split)
        print(
            f"{split:6}{summary.images:9,} images {summary.captions:9,} captions"
            f"   checksum {summary.checksum}"
        )
        if split != "train" and (few := few_images(split, summary.images)):
            print(few)
    print(f"skipped: {len(prepared.skipped())}, listed in {prepared.folder / storage.SKIPPED_FILE}")
    # A pretrained encoder's limit is its own, in tokens, and its tokenizer may not be here.
    if not config.encoder.text.pretrained:
        splits = [name for name, summary in prepared.summaries.items() if summary.images]
        captions = (text for name in splits for text in prepared.load_split(name).captions)
        few = list(itertools.islice(captions, tokenizers.LOOKED_AT + 1))
        if line := tokenizers.unread(configuration.with_model_defaults(config, {}), few):
            print(line)
    if copies := prepared.copies():
        path = prepared.folder / "copies.json"
        if not path.exists():  # where the folder may be one that can only be read
            write_atomically(path, json.dumps(copies, indent=2) + "\n")
        across = sum(len({split for split, _ in files}) > 1 for files in copies)
        print(
            f"copies: {sum(map(len, copies))} images are byte-for-byte copies of {len(copies)}, "
            f"{across} of which occur in several splits; listed in {path}"
        )
    print(f"prepared in {prepared.folder}")
    if prepared.summaries["test"].images:
        test = prepared.load_split("test")
        if test.truth is not None:
            print(_density(test))


def _density(test: PairDataset) -> str:
    truth = test.truth.matrix()
    unlabelled = truth & (np.arange(len(truth))[:, None] != test.caption_image)
    share = unlabelled.sum() / (truth.size - len(test.captions))
    return f"false negatives: {share:.2%} of the unlabelled test pairs are true matches"


@contextlib.contextmanager
def _stopping_in_good_order():
    """Lets a signal raise an exception, so that no partial files stay."""
    before = {number: signal.signal(number, _stop) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number, frame):
    del frame
    raise Interrupted(number, "stopped; the same command goes on with the images not checked yet")


if __name__ == "__main__":
    command_line.run(main)

"""Searches images, or captions, with a trained run: by a sentence or by an image.

python -m fne_jax.search --workdir=runs/flickr30k --images=photos "a dog on a beach"
python -m fne_jax.search --workdir=runs/flickr30k --images=photos --image=beach.jpg
python -m fne_jax.search --workdir=runs/flickr30k --texts=test --image=beach.jpg --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import signal
import sys

from fne_jax import command_line
from fne_jax.data.sources import listing
from fne_jax.errors import Interrupted, UserError
from fne_jax.index import engines
from fne_jax.index.gallery import AnyPath, label_of
from fne_jax.index.search_index import RECALL_AT, Hit, SearchIndex, build_index
from fne_jax.model.model import load_workdir
from fne_jax.parallel.compile_cache import use_compile_cache

_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")


def main(arguments: list[str]) -> None:
    """Parses the command line, embeds new items, and prints what is nearest to each query."""
    options, overrides = _parse(arguments)
    workdir = pathlib.Path(options.workdir)
    model = load_workdir(workdir, options.checkpoint, overrides=overrides)
    use_compile_cache(model.config.compile_cache)
    if options.weights == "momentum":
        model = model.momentum()
    folder = pathlib.Path(options.index_dir or workdir) / _folder_name(options)
    try:
        index = build_index(
            model, options.images, texts=options.texts, folder=folder, engine=options.index
        )
        _print_recall(index, options.index)
        for text in options.query:
            _print(index.search(text, top=options.top), {"text": text}, options.json)
        for image in options.image:
            _print(index.search(image=image, top=options.top), {"image": image}, options.json)
    except KeyboardInterrupt:
        message = f"stopped; what is embedded is kept in {folder}: the same command goes on"
        raise Interrupted(signal.SIGINT, message) from None


def _parse(arguments):
    parser = command_line.parser("Searches images or captions with a trained run.", "search")
    parser.add_argument("query", nargs="*", metavar="TEXT", help="a sentence to search with")
    parser.add_argument(
        "--workdir",
        required=True,
        help="folder of the run; --config.data.dir=DIR tells where its data lie now",
    )
    parser.add_argument(
        "--images",
        help="what is searched: a folder of images (with subfolders), a table (.csv, .tsv, "
        ".jsonl) as config.data.source reads it, or train, val or test of the run's dataset",
    )
    parser.add_argument(
        "--texts",
        help="search texts instead: the captions of a table or of train, val or test, or the lines "
        "of a file",
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image to search with"
    )
    parser.add_argument("--top", type=int, default=10, help="results of each query")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each query")
    parser.add_argument(
        "--index",
        default=engines.EXACT,
        help=f"what finds the nearest: {engines.FORMS}; {engines.EXACT} by default",
    )
    parser.add_argument(
        "--index-dir",
        metavar="FOLDER",
        help="where the embeddings are kept, for a run that cannot be written to; its workdir by "
        "default",
    )
    parser.add_argument("--checkpoint", default="best", help="best (by default), latest or a step")
    parser.add_argument(
        "--weights", choices=["online", "momentum"], default="online", help="of the encoders"
    )
    options, overrides = command_line.parse_with_overrides(parser, arguments)
    command_line.expand_home(options, "workdir", "images", "texts", "image", "index_dir")
    if (options.images is None) == (options.texts is None):
        raise UserError("give either the --images or the --texts to be searched")
    if options.top < 1:
        raise UserError(f"--top is {options.top}; expected at least 1")
    engines.check_spec(options.index)
    for image in options.image:
        if not pathlib.Path(image).is_file():
            raise UserError(f"--image={image} is not a file")
    for text in options.query:
        if not text.strip():
            raise UserError("the text to search by is empty")
        listing.check_text("the text to search by", text)
    return options, overrides


def _folder_name(options: argparse.Namespace) -> str:
    """Returns the name of the folder, in the run's or --index-dir, that keeps the embeddings."""
    source: AnyPath = options.images or options.texts
    name = f"index_{label_of(source)}" + ("_texts" if options.texts else "")
    return name + ("" if options.weights == "online" else f"_{options.weights}")


def _print_recall(index: SearchIndex, spec: str) -> None:
    if index.recall:
        shares = ", ".join(
            f"{name.replace('_', '-')} {share:.3f}" for name, share in index.recall.items()
        )
        print(f"{spec}: recall at {RECALL_AT} against exact: {shares}", file=sys.stderr)


def _print(hits: list[Hit], query: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({**query, "hits": [dataclasses.asdict(hit) for hit in hits]}), flush=True)
        return
    lines = ["", *map(_visible, query.values())]
    for hit in hits:
        lines.append(f"{hit.rank:4}  {hit.score:6.3f}  {_visible(hit.path or hit.name)}")
        lines += [f"{'':14}{_visible(caption)}" for caption in hit.captions]
    # Names of files may hold bytes that are no text, and the terminal lack a letter.
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(lines).encode(encoding, "backslashreplace").decode(encoding)
    print(text, flush=True)


def _visible(text):
    """Returns a text with line breaks and control characters escaped."""
    return _CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


if __name__ == "__main__":
    command_line.run(main)

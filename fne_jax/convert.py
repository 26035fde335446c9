"""Imports and exports: the authors' checkpoints, encoders, the hub, the order of a split's rows.

python -m fne_jax.convert reference model_best.pth.tar --out=runs/authors
python -m fne_jax.convert export --workdir=runs/flickr30k --out=exported
python -m fne_jax.convert push OWNER/NAME --from=exported
python -m fne_jax.convert order --config=configs/flickr30k.py --split=test --out=theirs
"""

from __future__ import annotations

import argparse
import pathlib
import re
import tempfile

from fne_jax import command_line, configuration
from fne_jax.conversion import hub
from fne_jax.conversion.export import export
from fne_jax.conversion.reference import convert
from fne_jax.encoders.hub_files import REPOSITORY
from fne_jax.errors import UserError
from fne_jax.evaluation import embedding_files
from fne_jax.model.model import load_evaluation_split

REFERENCE_CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "flickr30k_reference.py"


def main(arguments: list[str]) -> None:
    """Parses the command line and converts."""
    parser = command_line.parser("Converts checkpoints and splits.", "convert")
    commands = parser.add_subparsers(dest="command", required=True)
    reference = commands.add_parser("reference", help="turn the authors' checkpoint into a run")
    reference.add_argument("checkpoint", help="model_best.pth.tar; needs the extra [convert]")
    reference.add_argument("--out", required=True, help="workdir to make")
    reference.add_argument(
        "--config",
        default=str(REFERENCE_CONFIG),
        help="config with its encoders and tokenizer",
    )
    reference.set_defaults(convert=convert_reference)
    exported = commands.add_parser("export", help="a run's encoders for PyTorch")
    exported.add_argument("--workdir", required=True, help="folder of the run")
    exported.add_argument("--checkpoint", default="best", help="best, latest or a step")
    exported.add_argument("--out", required=True, help="folder to make")
    exported.add_argument(
        "--stablehlo",
        action="store_true",
        help="both encoders as programs for jax and flatbuffers, too",
    )
    exported.add_argument(
        "--onnx", action="store_true", help="both encoders for onnxruntime, too; extra [onnx]"
    )
    exported.set_defaults(convert=convert_export)
    pushed = commands.add_parser("push", help="a run, or what export wrote, onto the hub")
    pushed.add_argument("repository", metavar="OWNER/NAME", help="a private one, made if need be")
    pushed.add_argument(
        "--from", dest="folder", metavar="FOLDER", required=True, help="of a run, or exported"
    )
    pushed.add_argument("--checkpoint", help="of a run: best (by default), latest or a step")
    pushed.add_argument("--public", action="store_true", help="let everybody read it")
    pushed.add_argument(
        "--replace", action="store_true", help="also if it has files, which these take the place of"
    )
    pushed.add_argument("--dry-run", action="store_true", help="list the files, send nothing")
    pushed.set_defaults(convert=convert_push)
    order = commands.add_parser(
        "order", help="a split's names, captions and ids, in the order of the rows of embeddings"
    )
    order.add_argument("--config", required=True, help="config file of the data; --config.x=y")
    order.add_argument("--split", default="test", help="train, val or test (by default)")
    order.add_argument(
        "--out", required=True, help="folder for these files, and later the embeddings"
    )
    order.set_defaults(convert=convert_order)
    options, overrides = parser.parse_known_args(arguments)
    if overrides and "config" not in options:
        raise UserError(f"unknown argument {overrides[0]!r}; see --help")
    paths = {"checkpoint", "workdir", "out", "config", "folder"} & vars(options).keys()
    command_line.expand_home(options, *paths)
    options.convert(options, overrides)


def convert_reference(options: argparse.Namespace, overrides: list[str]) -> None:
    """Writes a run from the authors' checkpoint."""
    config = configuration.load_config(options.config, overrides)
    out = pathlib.Path(options.out)
    step = convert(pathlib.Path(options.checkpoint), config, out)
    print(f"written to {out}: step {step}")
    print(f"python -m fne_jax.evaluate --workdir={out} --split=test")


def convert_export(options: argparse.Namespace, _: list[str]) -> None:
    """Writes a run's encoders."""
    workdir, out = pathlib.Path(options.workdir), pathlib.Path(options.out)
    more = {"stablehlo": options.stablehlo, "onnx": options.onnx}
    for path in export(workdir, options.checkpoint, out, **more):
        print(f"written to {path}")


def convert_push(options: argparse.Namespace, _: list[str]) -> None:
    """Lists the files of a folder that belong on the hub, and sends them."""
    repository, folder, home = options.repository, pathlib.Path(options.folder), pathlib.Path.home()
    if not re.fullmatch(REPOSITORY, repository):
        raise UserError(f"{repository!r} is no repository; expected OWNER/NAME")
    with tempfile.TemporaryDirectory(prefix="fne_jax_push_") as scratch:
        files = hub.files_to_push(folder, options.checkpoint, pathlib.Path(scratch))
        sizes = {name: path.stat().st_size for name, path in files.items()}
        for name, size in sizes.items():
            print(f"{size:16,}  {name}")
            if name.endswith((".json", ".md")) and f"{home}/" in files[name].read_text("utf-8"):
                print(f"{'':18}which names folders in {home}")
        kind, total = "public" if options.public else "private", sum(sizes.values())
        print(f"{total:16,}  bytes in {len(sizes)} files, for {repository} ({kind})", flush=True)
        if not options.dry_run:
            how = {"public": options.public, "replace": options.replace}
            print(f"pushed: {hub.push(repository, files, **how)}")


def convert_order(options: argparse.Namespace, overrides: list[str]) -> None:
    """Writes all files of a folder of embeddings except the embeddings, without a model."""
    config = configuration.load_config(options.config, overrides)
    config = configuration.with_model_defaults(config, {})  # no encoder of it is needed
    dataset, out = load_evaluation_split(config, options.split), pathlib.Path(options.out)
    embedding_files.write_order(out, dataset)
    print(
        f"written to {out}: {options.split}, {len(dataset.image_id):,} images, "
        f"{len(dataset.captions):,} captions, in the order of names.json\n"
        "save your model's image_embeddings.npy and text_embeddings.npy beside them, then\n"
        f"python -m fne_jax.evaluate --embeddings={out}"
    )


if __name__ == "__main__":
    command_line.run(main)

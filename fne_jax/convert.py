"""Imports and exports: the authors' checkpoints, encoders, and the order of a split's rows.

python -m fne_jax.convert reference model_best.pth.tar --out=runs/authors
python -m fne_jax.convert export --workdir=runs/flickr30k --out=exported
python -m fne_jax.convert order --config=configs/flickr30k.py --split=test --out=theirs
"""

from __future__ import annotations

import argparse
import pathlib

from fne_jax import command_line, configuration
from fne_jax.conversion.export import export
from fne_jax.conversion.reference import convert
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
        "--stablehlo", action="store_true", help="both encoders as programs for jax alone, too"
    )
    exported.add_argument(
        "--onnx", action="store_true", help="both encoders for onnxruntime, too; extra [onnx]"
    )
    exported.set_defaults(convert=convert_export)
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
    paths = {"checkpoint", "workdir", "out", "config"} & vars(options).keys()
    command_line.expand_home(options, *paths)
    options.convert(options, overrides)


def convert_reference(options: argparse.Namespace, overrides: list[str]) -> None:
    """Writes a run from the authors' checkpoint."""
    config = configuration.load_config(options.config, overrides)
    out = pathlib.Path(options.out)
    step = convert(pathlib.Path(options.checkpoint), config, out)
    print(f"written to {out}: step {step}")
    print(f"python -m fne_jax.evaluate --workdir={out} --split=test")


def convert_export(options: argparse.Namespace, overrides: list[str]) -> None:
    """Writes a run's encoders."""
    if overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; see --help")
    workdir, out = pathlib.Path(options.workdir), pathlib.Path(options.out)
    more = {"stablehlo": options.stablehlo, "onnx": options.onnx}
    for path in export(workdir, options.checkpoint, out, **more):
        print(f"written to {path}")


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

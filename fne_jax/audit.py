"""Lists a dataset's likely false negatives: pairs that match but that nobody labelled.

python -m fne_jax.audit --workdir=runs/shapes --split=train
python -m fne_jax.audit --embeddings=DIR --config=configs/flickr30k.py --split=test --out=DIR
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

import jax
import ml_collections
import numpy as np

from fne_jax import command_line, configuration
from fne_jax.errors import UserError
from fne_jax.model.model import load_evaluation_split, restore_model

if TYPE_CHECKING:
    from fne_jax.data.pairs import PairDataset
    from fne_jax.objectives.similarity_statistics import SimilarityStatistics
    from fne_jax.retrieval.unlabelled import UnlabelledPairs

# Pairs that the precision is measured over, and drawn ones that it is compared with.
_PRECISION_AT, _DRAWN = 100, 100_000
_RANKINGS = {
    "lead": "by how far the caption is more similar to that image than to its own",
    "posterior": "by posterior",
}


@dataclasses.dataclass(frozen=True)
class _Audited:
    """A split with a model's embeddings of it and the statistics that the posterior takes."""

    name: str  # of the run, or of the folder of embeddings
    step: int | None  # of the run
    config: ml_collections.ConfigDict
    dataset: PairDataset
    image_emb: np.ndarray
    text_emb: np.ndarray
    stats: SimilarityStatistics


def main(arguments: list[str]) -> None:
    """Parses the command line, ranks the pairs and writes them."""
    options, overrides = _parse(arguments)

    from fne_jax.objectives.similarity_statistics import false_negative_posterior
    from fne_jax.report import audit_pages
    from fne_jax.retrieval import unlabelled

    if options.workdir is not None:
        audited, out = _of_run(options), pathlib.Path(options.workdir) / f"audit_{options.split}"
    else:
        audited, out = _of_embeddings(options, overrides), None
    out = pathlib.Path(options.out) if options.out else out
    config, dataset, stats = audited.config, audited.dataset, audited.stats
    if min(stats.positive.count, stats.negative.count) < 2:
        raise UserError(
            f"{audited.name}: there are statistics of fewer than two pairs, so there is no "
            "posterior; choose a later --checkpoint, or a split of more pairs"
        )
    pairs = unlabelled.unlabelled_pairs(
        audited.image_emb,
        audited.text_emb,
        dataset.caption_image,
        per_query=options.per_query,
        relative=options.rank_by == "lead",
    )
    # Monotone, whatever the run trained with: a more similar pair is not a worse suspect.
    posterior = np.asarray(
        false_negative_posterior(pairs.similarity, stats, config.fne.prior, monotone=True)
    )
    least = options.min_posterior
    least = config.fne.posterior_threshold if least is None else least
    pairs, posterior = pairs[posterior >= least], posterior[posterior >= least]
    of_step = "" if audited.step is None else f"step {audited.step}, "
    print(
        f"{of_step}{options.split}: {len(dataset.captions):,} captions, "
        f"{len(dataset.image_id):,} images\n"
        f"{len(posterior):,} unlabelled pairs of posterior {least:g} or more among the "
        f"{options.per_query} best of each caption and image"
    )
    if dataset.truth is not None and len(posterior):
        print(_precision(dataset, pairs[:_PRECISION_AT]))
    about = {
        "run": audited.name,
        "step": audited.step,
        "split": options.split,
        "suspected": len(posterior),
        "least": least,
        "per_query": options.per_query,
        "rank_by": _RANKINGS[options.rank_by],
        "prior": config.fne.prior,
    }
    rows = audit_pages.rows(dataset, pairs[: options.limit], posterior[: options.limit])
    audit_pages.write(out, dataset, rows, about)
    print(f"the first {len(rows):,} are in {out}: open {audit_pages.page_name(1)}")


def _of_run(options):
    """Returns what a run's checkpoint makes of the split, with the statistics of its epoch."""
    workdir = pathlib.Path(options.workdir)
    model = restore_model(workdir, options.checkpoint or "best")
    dataset = model.load_split(options.split)
    split = model.embed_split(dataset)
    return _Audited(
        name=workdir.resolve().name,
        step=model.step,
        config=model.config,
        dataset=dataset,
        image_emb=split.image_emb,
        text_emb=split.text_emb,
        stats=jax.device_get(model.stats),
    )


def _of_embeddings(options, overrides):
    """Returns the split that the config describes with anyone's embeddings of it."""
    from fne_jax.retrieval import embedding_files
    from fne_jax.retrieval.split_statistics import split_statistics

    folder = pathlib.Path(options.embeddings)
    split = embedding_files.read_embeddings(folder)
    config, _ = configuration.resolve(configuration.load_config(options.config, overrides))
    dataset = load_evaluation_split(config, options.split)
    if not np.array_equal(split.caption_image, dataset.caption_image):
        raise UserError(
            f"--embeddings={folder} is of {len(split.image_emb)} images and {len(split.text_emb)} "
            f"captions, --split={options.split} of --config has {len(dataset.image_id)} and "
            f"{len(dataset.captions)}; expected the same, each caption with the same image"
        )
    batch = min(config.global_batch_size, len(split.text_emb))
    return _Audited(
        name=folder.resolve().name,
        step=None,
        config=config,
        dataset=dataset,
        image_emb=split.image_emb,
        text_emb=split.text_emb,
        stats=split_statistics(
            split.image_emb, split.text_emb, split.caption_image, batch=batch, seed=config.seed
        ),
    )


def _parse(arguments):
    parser = command_line.parser("Lists likely false negatives of a dataset.", "audit")
    parser.add_argument("--workdir", help="folder of the run whose model judges")
    parser.add_argument("--checkpoint", help="of the run: best (by default), latest or a step")
    parser.add_argument(
        "--embeddings", help="folder of embeddings, as `evaluate --dump` writes, instead of a run"
    )
    parser.add_argument(
        "--config",
        help="with --embeddings: of the data, the prior and the batch; --config.x=y overrides",
    )
    parser.add_argument("--split", default="train", help="train, val or test")
    parser.add_argument("--out", help="folder to write into; audit_<split> in the run's by default")
    parser.add_argument(
        "--per-query", type=int, default=5, help="pairs considered of each caption and image"
    )
    parser.add_argument("--limit", type=int, default=1000, help="most pairs written")
    parser.add_argument(
        "--min-posterior",
        type=float,
        help="least posterior of a pair; config.fne.posterior_threshold by default",
    )
    parser.add_argument(
        "--rank-by",
        choices=list(_RANKINGS),
        default="posterior",
        help="; ".join(f"{name}: {meaning}" for name, meaning in _RANKINGS.items()),
    )
    options, overrides = parser.parse_known_args(arguments)
    if (options.workdir is None) == (options.embeddings is None):
        raise UserError("give either the --workdir of a run or the folder of --embeddings")
    if options.embeddings is not None and (options.config is None or options.out is None):
        raise UserError("--embeddings takes the --config of the data, and --out, a folder")
    for name, given in (("checkpoint", options.embeddings), ("config", options.workdir)):
        if given is not None and getattr(options, name) is not None:
            owner = "workdir" if name == "checkpoint" else "embeddings"
            raise UserError(f"--{name} goes with --{owner}")
    if options.workdir is not None and overrides:
        raise UserError(f"unknown argument {overrides[0]!r}; see --help")
    for name in ("per_query", "limit"):
        if getattr(options, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 1"
            )
    if options.min_posterior is not None and not 0 <= options.min_posterior <= 1:
        raise UserError(f"--min-posterior is {options.min_posterior}; expected 0 to 1")
    return options, overrides


def _precision(dataset: PairDataset, pairs: UnlabelledPairs) -> str:
    """Returns what share of some pairs, and of drawn ones, is in truth a match."""
    right = dataset.truth.is_true(pairs.caption, pairs.image)
    rng = np.random.default_rng(0)
    caption = rng.integers(len(dataset.captions), size=_DRAWN)
    image = rng.integers(len(dataset.image_id), size=_DRAWN)
    other = image != dataset.caption_image[caption]
    drawn = dataset.truth.is_true(caption[other], image[other])
    return (
        f"precision at {len(right)}: {right.mean():.1%} are in truth matches, "
        f"{drawn.mean():.2%} of unlabelled pairs drawn at random"
    )


if __name__ == "__main__":
    command_line.run(main)

"""Lists a dataset's likely false negatives: pairs that match but that nobody labelled.

python -m fne_jax.audit --workdir=runs/shapes --split=train
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

import jax
import numpy as np

from fne_jax import command_line
from fne_jax.errors import UserError

if TYPE_CHECKING:
    from fne_jax.data.datasets import PairDataset
    from fne_jax.retrieval.unlabelled import UnlabelledPairs

# Pairs that the precision is measured over, and drawn ones that it is compared with.
_PRECISION_AT, _DRAWN = 100, 100_000
_RANKINGS = {
    "lead": "by how far the caption is more similar to that image than to its own",
    "posterior": "by posterior",
}


def main(arguments: list[str]) -> None:
    """Parses the command line, ranks the pairs and writes them."""
    options = _parse(arguments)

    from fne_jax.data.datasets import load_split
    from fne_jax.objectives.similarity_statistics import false_negative_posterior
    from fne_jax.report import audit_pages
    from fne_jax.retrieval import unlabelled
    from fne_jax.training import run

    workdir = pathlib.Path(options.workdir)
    restored = run.restore_run(workdir, options.checkpoint)
    config, stats = restored.config, jax.device_get(restored.state.stats)
    if min(stats.positive.count, stats.negative.count) < 2:
        raise UserError(
            f"{workdir}: the checkpoint of step {restored.step} has statistics of fewer than two "
            "pairs, so there is no posterior; choose a later --checkpoint"
        )
    dataset = load_split(config.data, config.encoder.image.image_size, options.split)
    tokens = run.tokenize_captions(
        config, restored.tokenizer, dataset.captions, config.evaluation.text_length
    )
    embedder = run.build_embedder(config, restored.module, restored.mesh)
    pairs = unlabelled.unlabelled_pairs(
        embedder.images(restored.params, dataset),
        embedder.texts(restored.params, tokens),
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
    print(
        f"step {restored.step}, {options.split}: {len(dataset.captions):,} captions, "
        f"{len(dataset.image_id):,} images\n"
        f"{len(posterior):,} unlabelled pairs of posterior {least:g} or more among the "
        f"{options.per_query} best of each caption and image"
    )
    if dataset.truth is not None and len(posterior):
        print(_precision(dataset, pairs[:_PRECISION_AT]))
    out = pathlib.Path(options.out) if options.out else workdir / f"audit_{options.split}"
    about = {
        "run": workdir.resolve().name,
        "step": restored.step,
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


def _parse(arguments):
    parser = command_line.parser("Lists likely false negatives of a dataset.", "audit")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
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
    options = parser.parse_args(arguments)
    for name in ("per_query", "limit"):
        if getattr(options, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 1"
            )
    if options.min_posterior is not None and not 0 <= options.min_posterior <= 1:
        raise UserError(f"--min-posterior is {options.min_posterior}; expected 0 to 1")
    return options


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

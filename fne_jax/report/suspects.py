"""Likely false negatives of a split: unlabelled pairs that a model and its statistics suspect."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import load_evaluation_split, restore_model
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    false_negative_posterior,
    update_similarity_statistics,
)
from fne_jax.retrieval.embedding_files import read_embeddings_of
from fne_jax.retrieval.unlabelled import UnlabelledPairs, unlabelled_pairs

# By what pairs are ranked.
RANKINGS = {
    "lead": "by how far the caption is more similar to that image than to its own",
    "posterior": "by posterior",
}
# Pairs that the precision is measured over, and random ones that it is compared with.
_PRECISION_AT, _RANDOM_PAIRS = 100, 100_000


@dataclasses.dataclass(frozen=True)
class JudgedSplit:
    """A split with a model's embeddings of it and the statistics that the posterior takes.

    Attributes:
      name: The name of the run, or of the folder of embeddings.
      step: The step of the run's checkpoint; None for embeddings of any other model.
      split_name: `train`, `val` or `test`.
      config: The config of the run, or of the data.
      dataset: The split.
      embedded: Its embeddings.
      stats: The similarity statistics, on the host.
    """

    name: str
    step: int | None
    split_name: str
    config: ml_collections.ConfigDict
    dataset: PairDataset
    embedded: EmbeddedSplit
    stats: SimilarityStatistics


@dataclasses.dataclass(frozen=True)
class Suspects:
    """Unlabelled pairs of a high posterior.

    Attributes:
      pairs: The pairs, the most suspect first.
      posterior: [pairs] float32, the probability that each is a match.
      least: The least posterior that was asked for.
      per_query: How many pairs of each caption and of each image were looked at.
      rank_by: A key of `RANKINGS`.
    """

    pairs: UnlabelledPairs
    posterior: np.ndarray
    least: float
    per_query: int
    rank_by: str


def judged_by_run(workdir: pathlib.Path, checkpoint: str, split_name: str) -> JudgedSplit:
    """Returns a split as a run's checkpoint sees it, with the statistics of the run's last epoch.

    Args:
      workdir: The folder of the run.
      checkpoint: `best`, `latest` or a step.
      split_name: `train`, `val` or `test`.

    Raises:
      UserError: if the folder is not a run's, or the checkpoint or the split cannot be read.
    """
    model = restore_model(workdir, checkpoint)
    dataset = model.load_split(split_name)
    return JudgedSplit(
        name=workdir.resolve().name,
        step=model.step,
        split_name=split_name,
        config=model.config,
        dataset=dataset,
        # The matrix of all true matches, large for a training split, is not needed.
        embedded=model.embed_split(dataclasses.replace(dataset, truth=None)),
        stats=jax.device_get(model.stats),
    )


def judged_by_embeddings(
    folder: pathlib.Path, config: ml_collections.ConfigDict, split_name: str
) -> JudgedSplit:
    """Returns a split with anyone's embeddings of it, and the statistics that these give.

    Args:
      folder: The folder of the embeddings.
      config: The resolved config of the data.
      split_name: `train`, `val` or `test`.

    Raises:
      UserError: if the embeddings or the split cannot be read, or do not belong together.
    """
    dataset = load_evaluation_split(config, split_name)
    embedded = read_embeddings_of(folder, dataset)
    batch = min(config.global_batch_size, len(dataset.captions))
    return JudgedSplit(
        name=folder.resolve().name,
        step=None,
        split_name=split_name,
        config=config,
        dataset=dataset,
        embedded=embedded,
        stats=split_statistics(embedded, batch=batch, seed=config.seed),
    )


def split_statistics(embedded: EmbeddedSplit, *, batch: int, seed: int) -> SimilarityStatistics:
    """Returns what an epoch of batches adds up to, as in training but for the model's learning.

    Args:
      embedded: The embeddings of the split.
      batch: How many pairs compete for each other; a last batch of fewer is left out.
      seed: The seed of the captions' order.
    """
    update = jax.jit(update_similarity_statistics)
    stats = SimilarityStatistics.create()
    order = np.random.default_rng(seed).permutation(len(embedded.text_emb))
    for start in range(0, len(order) - batch + 1, batch):
        rows = order[start : start + batch]
        images = embedded.caption_image[rows]
        stats = update(
            stats,
            jnp.asarray(embedded.image_emb[images]),
            jnp.asarray(embedded.text_emb[rows]),
            jnp.asarray(images[:, None] == images[None, :]),
        )
    return jax.device_get(stats)


def can_suspect(stats: SimilarityStatistics, fne: ml_collections.ConfigDict) -> bool:
    """Returns whether the statistics have seen enough pairs, as the loss asks it of them."""
    enough = stats.positive.count > fne.min_count
    return bool(enough and min(stats.positive.count, stats.negative.count) >= 2)


def find_suspects(
    judged: JudgedSplit, *, per_query: int, rank_by: str, least: float | None = None
) -> Suspects:
    """Returns the pairs of a posterior of `least` or more.

    Args:
      judged: The split.
      per_query: How many pairs of each caption, and of each image, to look at.
      rank_by: A key of `RANKINGS`.
      least: The least posterior; None for `config.fne.posterior_threshold`.

    Raises:
      UserError: if the statistics have seen too few pairs to suspect any.
    """
    stats, fne = judged.stats, judged.config.fne
    if not can_suspect(stats, fne):
        raise UserError(
            f"{judged.name}: the statistics are of {stats.positive.count:,.0f} matching pairs, and "
            f"nothing is suspected before there are more than config.fne.min_count, "
            f"{fne.min_count:,}; choose a later --checkpoint, or with --embeddings a split of more "
            "pairs or a lower --config.fne.min_count"
        )
    embedded = judged.embedded
    pairs = unlabelled_pairs(
        embedded.image_emb,
        embedded.text_emb,
        embedded.caption_image,
        per_query=per_query,
        relative=rank_by == "lead",
    )
    # Monotone, whatever the run trained with: a more similar pair is not a worse suspect.
    posterior = np.asarray(
        false_negative_posterior(pairs.similarity, stats, fne.prior, monotone=True)
    )
    least = fne.posterior_threshold if least is None else least
    kept = posterior >= least
    return Suspects(pairs[kept], posterior[kept], least, per_query, rank_by)


def describe(judged: JudgedSplit, suspects: Suspects) -> str:
    """Returns what was found, as lines for a terminal; with its precision where truth is known."""
    of_step = "" if judged.step is None else f"step {judged.step}, "
    dataset, count = judged.dataset, len(suspects.posterior)
    lines = [
        f"{of_step}{judged.split_name}: {len(dataset.captions):,} captions, "
        f"{len(dataset.image_id):,} images",
        f"{count:,} unlabelled pairs of posterior {suspects.least:g} or more among the "
        f"{suspects.per_query} best of each caption and image",
    ]
    measured = precision(judged, suspects)
    return "\n".join([*lines, measured] if measured else lines)


def precision(judged: JudgedSplit, suspects: Suspects) -> str:
    """Returns `precision_text` of the first hundred pairs; "" where the truth is not known."""
    if judged.dataset.truth is None or not len(suspects.posterior):
        return ""
    return precision_text(judged.dataset, suspects.pairs[:_PRECISION_AT])


def precision_text(dataset: PairDataset, pairs: UnlabelledPairs) -> str:
    """Returns what share of some pairs, and of random unlabelled ones, is in truth a match."""
    right = dataset.truth.is_true(pairs.caption, pairs.image)
    rng = np.random.default_rng(0)
    caption = rng.integers(len(dataset.captions), size=_RANDOM_PAIRS)
    image = rng.integers(len(dataset.image_id), size=_RANDOM_PAIRS)
    other = image != dataset.caption_image[caption]
    random = dataset.truth.is_true(caption[other], image[other])
    return (
        f"precision at {len(right)}: {right.mean():.1%} are in truth matches, "
        f"{random.mean():.2%} of unlabelled pairs drawn at random"
    )

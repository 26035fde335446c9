"""Likely false negatives of a split: unlabelled pairs that a detector suspects."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.data.verdicts import MATCH, NO_MATCH, Verdict, agreed, rows_of
from fne_jax.evaluation.embedding_files import read_caption_embeddings, read_embeddings_of
from fne_jax.false_negatives import detection_quality, detectors, kept_embeddings
from fne_jax.false_negatives.fitted_detector import FittedDetector
from fne_jax.false_negatives.likely_matches import LEAST_PROBABILITY, write_likely_matches
from fne_jax.false_negatives.unlabelled import UnlabelledPairs, unlabelled_pairs
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import Model, load_evaluation_split, load_workdir
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    update_similarity_statistics,
)

# By what pairs are ranked.
RANKINGS = {
    "lead": "by how far the caption is more similar to that image than to its own",
    "probability": "by the detector's probability, then by its score",
}
# Pairs that the precision is measured over, and random ones that it is compared with.
_PRECISION_AT, _RANDOM_PAIRS = 100, 100_000


@dataclasses.dataclass(frozen=True)
class JudgedSplit:
    """A split with a model's embeddings of it and all else that detectors take.

    Attributes:
      name: The name of the run, or of the folder of embeddings.
      step: The step of the run's checkpoint; None for embeddings of any other model.
      split_name: `train`, `val` or `test`.
      config: The config of the run, or of the data.
      dataset: The split.
      embedded: Its embeddings.
      stats: The similarity statistics, on the host.
      caption_bank: [captions, dim] the momentum encoder's embeddings of the captions, or the
        model's own where it has no momentum encoder; L2-normalised.
      external: [captions, dim] another sentence encoder's, L2-normalised, or None.
      fitted: The detector that was fitted to verdicts, or None.
    """

    name: str
    step: int | None
    split_name: str
    config: ml_collections.ConfigDict
    dataset: PairDataset
    embedded: EmbeddedSplit
    stats: SimilarityStatistics
    caption_bank: np.ndarray | None = None
    external: np.ndarray | None = None
    fitted: FittedDetector | None = None

    @property
    def evidence(self) -> detectors.Evidence:
        """What detectors take of it."""
        return detectors.Evidence(
            captions=self.dataset.captions,
            caption_image=self.dataset.caption_image,
            images=len(self.dataset.image_id),
            prior=self.config.fne.prior,
            stats=self.stats,
            min_count=self.config.fne.min_count,
            caption_bank=self.caption_bank,
            external=self.external,
            image_emb=self.embedded.image_emb,
            text_emb=self.embedded.text_emb,
            fitted=self.fitted,
        )


@dataclasses.dataclass(frozen=True)
class Suspects:
    """Unlabelled pairs of a high probability.

    Attributes:
      pairs: The pairs, the most suspect first.
      judgement: What the detector finds of them.
      detector: A key of `DETECTORS`.
      least: The least probability that was asked for.
      per_query: How many pairs of each caption and of each image were looked at.
      rank_by: A key of `RANKINGS`.
      refuted: How many pairs were left out since people say that they do not match.
      confirmed: The rows of caption and image of the pairs that people say match.
    """

    pairs: UnlabelledPairs
    judgement: detectors.Judgement
    detector: str
    least: float
    per_query: int
    rank_by: str
    refuted: int = 0
    confirmed: frozenset[tuple[int, int]] = frozenset()


def judged_by_run(
    workdir: pathlib.Path,
    checkpoint: str,
    split_name: str,
    caption_embeddings: pathlib.Path | None = None,
) -> JudgedSplit:
    """Returns a split as a run's checkpoint sees it, with the statistics of the run's last epoch.

    Args:
      workdir: The folder of the run.
      checkpoint: `best`, `latest` or a step.
      split_name: `train`, `val` or `test`.
      caption_embeddings: An `.npy` of the captions' embeddings by another sentence encoder.

    Raises:
      UserError: if the folder is not a run's, or the checkpoint, the split or the captions'
        embeddings cannot be read.
    """
    model = load_workdir(workdir, checkpoint)
    return judged_by_model(model, workdir.resolve().name, split_name, caption_embeddings)


def judged_by_model(
    model: Model,
    name: str,
    split_name: str,
    caption_embeddings: pathlib.Path | None = None,
    kept: pathlib.Path | None = None,
) -> JudgedSplit:
    """Returns a split as a run's model sees it, with the statistics of the run's last epoch.

    Args:
      model: The run's, with its momentum encoders and its statistics.
      name: The run's name.
      split_name: `train`, `val` or `test`.
      caption_embeddings: An `.npy` of the captions' embeddings by another sentence encoder.
      kept: An `.npz` to keep the embeddings in for the next time, or None.

    Raises:
      UserError: if the split or the captions' embeddings cannot be read.
    """
    dataset = model.load_split(split_name)
    external = _external(caption_embeddings, dataset)
    embedded, caption_bank = kept_embeddings.embed(model, dataset, kept)
    return JudgedSplit(
        name=name,
        step=model.step,
        split_name=split_name,
        config=model.config,
        dataset=dataset,
        embedded=embedded,
        stats=jax.device_get(model.stats),
        caption_bank=caption_bank,
        external=external,
    )


def judged_by_embeddings(
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
    split_name: str,
    caption_embeddings: pathlib.Path | None = None,
) -> JudgedSplit:
    """Returns a split with anyone's embeddings of it, and the statistics that these give.

    Args:
      folder: The folder of the embeddings.
      config: The resolved config of the data.
      split_name: `train`, `val` or `test`.
      caption_embeddings: An `.npy` of the captions' embeddings by another sentence encoder.

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
        caption_bank=embedded.text_emb,
        external=_external(caption_embeddings, dataset),
    )


def _external(path, dataset):
    return None if path is None else read_caption_embeddings(path, len(dataset.captions))


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


def find_suspects(
    judged: JudgedSplit,
    *,
    per_query: int,
    rank_by: str,
    detector: str | None = None,
    least: float | None = None,
) -> Suspects:
    """Returns the pairs that a detector gives a probability of `least` or more.

    The pairs that it judges are the most similar ones of each caption and of each image, or those
    of the largest lead if they are ranked by that.

    Args:
      judged: The split.
      per_query: How many pairs of each caption, and of each image, to look at.
      rank_by: A key of `RANKINGS`.
      detector: A key of `DETECTORS`; None for the best that is there.
      least: The least probability; None for `config.fne.posterior_threshold`.

    Raises:
      UserError: if the detector needs what is not there, such as enough statistics.
    """
    evidence = judged.evidence
    detector = detectors.best_available(evidence) if detector is None else detector
    judge = detectors.fitted(detector, evidence)
    embedded = judged.embedded
    pairs = unlabelled_pairs(
        embedded.image_emb,
        embedded.text_emb,
        embedded.caption_image,
        per_query=per_query,
        relative=rank_by == "lead",
    )
    judgement = judge(detectors.PairsToJudge(pairs.caption, pairs.image, pairs.similarity))
    least = judged.config.fne.posterior_threshold if least is None else least
    order = np.arange(len(pairs.caption))
    if rank_by == "probability":
        # What the detector does not tell apart stays in the order of similarity.
        order = np.lexsort((order, -judgement.score, -judgement.probability))
    order = order[judgement.probability[order] >= least]
    return Suspects(pairs[order], judgement[order], detector, least, per_query, rank_by)


def write_matches(
    judged: JudgedSplit,
    detector: str | None,
    path: pathlib.Path,
    per_query: int,
    least: float | None = None,
) -> str:
    """Writes the likely matches of a split for `config.data.matches`, and returns what they are.

    Args:
      judged: The split.
      detector: A key of `DETECTORS`; None for the best that is there.
      path: The file, which ends in `.npz`.
      per_query: How many images of each caption to look at, by similarity and by captions each.
      least: The least probability; None for `LEAST_PROBABILITY` or, of the detector `fitted`, for
        the one from which on that share of the verdicts that it was not fitted to are matches.

    Raises:
      UserError: if the detector needs what is not there, or the file cannot be written.
    """
    evidence = judged.evidence
    detector = detectors.best_available(evidence) if detector is None else detector
    if least is None and detector == "fitted" and judged.fitted is not None:
        least = judged.fitted.threshold(LEAST_PROBABILITY)
    about = write_likely_matches(
        path,
        judged.dataset,
        evidence,
        detectors.fitted(detector, evidence),
        per_caption=per_query,
        least=LEAST_PROBABILITY if least is None else least,
        about={
            "detector": detector,
            "model": judged.name,
            "step": judged.step,
            "split": judged.split_name,
        },
    )
    precision = about.get("precision")
    shown = "" if precision is None else f", of which {precision:.1%} are in truth matches"
    return (
        f"detector {detector}: {about['matches']:,} pairs of probability "
        f"{about['least_probability']:g} or more{shown}; written to {path}, for config.data.matches"
    )


def heed_verdicts(
    suspects: Suspects, verdicts: Sequence[Verdict], dataset: PairDataset
) -> Suspects:
    """Returns the suspects without those that people refuted, and with what they confirmed.

    Args:
      suspects: Suspects of a split.
      verdicts: Each reviewer's last verdict on each pair of the split; the majority's counts.
      dataset: The split.

    Raises:
      UserError: if a verdict is of another dataset.
    """
    votes = agreed(verdicts)
    captions, images = rows_of(votes, dataset)
    said = {
        (int(caption), int(image)): vote.verdict
        for vote, caption, image in zip(votes, captions, images, strict=True)
    }
    pairs = zip(suspects.pairs.caption.tolist(), suspects.pairs.image.tolist(), strict=True)
    kept = np.array([said.get(pair) != NO_MATCH for pair in pairs], bool)
    return dataclasses.replace(
        suspects,
        pairs=suspects.pairs[kept],
        judgement=suspects.judgement[kept],
        refuted=int((~kept).sum()),
        confirmed=frozenset(pair for pair, verdict in said.items() if verdict == MATCH),
    )


def detector_quality(judged: JudgedSplit) -> dict[str, Any]:
    """Returns how good each detector that is there is, where the truth is known; else {}.

    Measured among the hardest candidates of random queries, as `detection_quality.quality` tells.
    """
    if judged.dataset.truth is None:
        return {}
    evidence, embedded = judged.evidence, judged.embedded
    candidates = detection_quality.split_candidates(
        embedded.image_emb, embedded.text_emb, embedded.caption_image, seed=judged.config.seed
    )
    judges = {name: detectors.fitted(name, evidence) for name in detectors.available(evidence)}
    return detection_quality.quality(judges, candidates, judged.dataset.truth.is_true)


def describe(judged: JudgedSplit, suspects: Suspects, quality: dict[str, Any]) -> str:
    """Returns what was found, as lines for a terminal; with its precision where truth is known.

    Args:
      judged: The split.
      suspects: All its suspects.
      quality: What `detector_quality` returned.
    """
    of_step = "" if judged.step is None else f"step {judged.step}, "
    dataset, count = judged.dataset, len(suspects.judgement.probability)
    lines = [
        f"{of_step}{judged.split_name}: {len(dataset.captions):,} captions, "
        f"{len(dataset.image_id):,} images",
        f"detector {suspects.detector}: {detectors.DETECTORS[suspects.detector].description}",
        f"{count:,} unlabelled pairs of probability {suspects.least:g} or more among the "
        f"{suspects.per_query} best of each caption and image",
    ]
    if suspects.refuted:
        lines.append(f"{suspects.refuted:,} more that reviewers refuted are left out")
    measured = precision(judged, suspects)
    return "\n".join([*lines, *([measured] if measured else []), *_quality_lines(quality)])


def _quality_lines(quality):
    """Returns a line for each detector, direction and number of hardest candidates."""
    lines = []
    for name, of_detector in quality.items():
        for among, scores in of_detector.items():
            direction, count = among.split("_hardest_")
            of = f"{name}, {direction}, hardest {count} of a query, {scores['density']:.1%} matches"
            if scores["roc_auc"] is None:
                lines.append(f"{of}: nothing to tell apart")
                continue
            lines.append(
                f"{of}: AUC {scores['roc_auc']:.3f}, AP {scores['average_precision']:.3f}, "
                f"precision at recall 0.3 {scores['precision_at_recall_0.3']:.1%}"
            )
    return lines


def precision(judged: JudgedSplit, suspects: Suspects) -> str:
    """Returns `precision_text` of the first hundred pairs; "" where the truth is not known."""
    if judged.dataset.truth is None or not len(suspects.judgement.probability):
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

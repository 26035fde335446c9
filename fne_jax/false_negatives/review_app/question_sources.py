"""Where questions come from: an audit's suspects, a random sample, or what systems find first."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.evaluation.embedding_files import read_embeddings_of
from fne_jax.false_negatives import judged_split
from fne_jax.false_negatives.judged_evaluation import EvaluationSample, first_results, pool
from fne_jax.false_negatives.judged_split import JudgedSplit
from fne_jax.false_negatives.review_app.questions import Question
from fne_jax.false_negatives.suspects import Suspects
from fne_jax.false_negatives.verdict_samples import sample, sample_name
from fne_jax.model import checkpoints
from fne_jax.model.model import load_workdir, stored_model
from fne_jax.parallel.compile_cache import use_compile_cache


def questions_of_suspects(split: JudgedSplit, suspects: Suspects, limit: int) -> list[Question]:
    """Returns a question for each of the first suspects."""
    pairs = suspects.pairs[:limit]
    return [
        Question(
            caption=caption,
            image=image,
            similarity=float(pairs.similarity[index]),
            own_similarity=None if suspects.of_labels else float(split.own_similarity[caption]),
            probability=None if suspects.of_labels else float(pairs.probability[index]),
            score=float(pairs.score[index]),
            nearest=-1 if pairs.nearest is None else int(pairs.nearest[index]),
            model=split.model_name,
        )
        for index, (caption, image) in enumerate(pairs.rows())
    ]


def questions_of_sample(split: JudgedSplit, count: int, seed: int) -> list[Question]:
    """Returns a question for each pair of a random sample, whose verdicts speak for all pairs.

    They tell nothing of how similar a model takes the two to be, which might sway who answers.
    """
    drawn = sample(split, count, seed)
    name = sample_name(split, count, seed)
    return [
        Question(*pair, model=split.model_name, sample=name, weight=weight)
        for pair, weight in zip(drawn.rows(), drawn.weight.tolist(), strict=True)
    ]


def questions_for_evaluation(
    systems: Sequence[pathlib.Path],
    checkpoint: str,
    split_name: str,
    sample: EvaluationSample,
    overrides: Sequence[str] = (),
) -> tuple[PairDataset, list[Question], str]:
    """Returns a question for each pair that a system finds first for random queries.

    They tell nothing of which system found what.

    Systems are folders of runs, at a checkpoint (`best`, `latest` or a step), or, but for the
    first, of embeddings as `evaluate --dump` writes. `overrides` are as of `load_workdir`.

    Returns:
      The split, the questions, and a line on where they come from.

    Raises UserError if a folder cannot be read, or is of other data than the first.
    """
    # All are looked at before the first is embedded, which may take long.
    runs, found, dataset = [], [], None
    for folder in systems:
        if dataset is not None and (folder / "image_embeddings.npy").exists():
            found.append(first_results(sample, read_embeddings_of(folder, dataset)))
            continue
        of_run = _split_of(folder, checkpoint, split_name, overrides)
        dataset = of_run if dataset is None else dataset
        if not _same(dataset, of_run):
            raise UserError(
                f"{folder}: its {split_name} split is not that of {systems[0]}; expected systems "
                "of the same data"
            )
        runs.append((folder, of_run))
    for folder, of_run in runs:
        model = load_workdir(folder, checkpoint, overrides=overrides)
        use_compile_cache(model.config.compile_cache)
        split = judged_split.embed(model, of_run, kept_path(folder, split_name))
        found.append(first_results(sample, split))
    pairs = pool(found, dataset.caption_image, sample.seed)
    questions = [Question(*pair, sample=sample.name) for pair in pairs.rows()]
    results = sum(of.caption.size for one in found for of in one.values())
    about = (
        f"{len(systems)} systems, the first {sample.first} results of {sample.queries:,} random "
        f"queries each way (seed {sample.seed}): {results:,} results, of which {len(questions):,} "
        "pairs are not labelled matches"
    )
    return dataset, questions, about


def _split_of(workdir, checkpoint, split_name, overrides) -> PairDataset:
    """Returns a run's split; UserError if it cannot be read, or the run has no such checkpoint."""
    model = stored_model(workdir, overrides=overrides)
    with checkpoints.reader(workdir) as manager:
        checkpoints.find_step(manager, checkpoint)
    return model.load_evaluation_split(split_name)


def kept_path(workdir: pathlib.Path, split_name: str) -> pathlib.Path:
    """Returns where a review keeps a split's embeddings for the next."""
    return workdir / "reviews" / f"embeddings_{split_name}.npz"


def _same(first, second):
    arrays = ("caption_image", "image_id", "caption_id", "image_names")
    return first.captions == second.captions and all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays
    )

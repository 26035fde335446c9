"""The questions by whose answers several systems are scored, blind to which found what."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.evaluation.embedding_files import read_embeddings_of
from fne_jax.false_negatives import kept_embeddings
from fne_jax.false_negatives.judged_evaluation import EvaluationSample, first_results, pool
from fne_jax.false_negatives.review_app.questions import Question
from fne_jax.model import checkpoints
from fne_jax.model.model import load_workdir, stored_model
from fne_jax.parallel.compile_cache import use_compile_cache


@dataclasses.dataclass(frozen=True)
class Pool:
    """What is asked for an evaluation.

    Attributes:
      dataset: The split.
      questions: The pairs, which tell nothing of the systems that found them.
      about: A line on where they come from.
    """

    dataset: PairDataset
    questions: Sequence[Question]
    about: str


def pool_of(
    systems: Sequence[pathlib.Path], checkpoint: str, split: str, sample: EvaluationSample
) -> Pool:
    """Returns the results of several systems for the same random queries, each pair once.

    Args:
      systems: Folders of runs or, but for the first, of embeddings as `evaluate --dump` writes.
      checkpoint: Of runs: `best`, `latest` or a step.
      split: `train`, `val` or `test`.
      sample: The queries.

    Raises:
      UserError: if a folder cannot be read, or is of other data than the first.
    """
    # All are looked at before the first is embedded, which may take long.
    runs, found, dataset = [], [], None
    for folder in systems:
        if dataset is not None and (folder / "image_embeddings.npy").exists():
            found.append(first_results(sample, read_embeddings_of(folder, dataset)))
            continue
        of_run = _split_of(folder, checkpoint, split)
        dataset = of_run if dataset is None else dataset
        if not _same(dataset, of_run):
            raise UserError(
                f"{folder}: its {split} split is not that of {systems[0]}; expected systems "
                "of the same data"
            )
        runs.append((folder, of_run))
    for folder, of_run in runs:
        model = load_workdir(folder, checkpoint)
        use_compile_cache(model.config.compile_cache)
        embedded, _ = kept_embeddings.embed(model, of_run, kept_path(folder, split))
        found.append(first_results(sample, embedded))
    captions, images = pool(found, dataset.caption_image, sample.seed)
    questions = [
        Question(int(caption), int(image), sample=sample.name)
        for caption, image in zip(captions, images, strict=True)
    ]
    results = sum(of.size for one in found for of in one.caption.values())
    about = (
        f"{len(systems)} systems, the first {sample.first} results of {sample.queries:,} random "
        f"queries each way (seed {sample.seed}): {results:,} results, of which {len(questions):,} "
        "pairs are not labelled matches"
    )
    return Pool(dataset, questions, about)


def _split_of(workdir, checkpoint, split) -> PairDataset:
    """Returns a run's split; UserError if it cannot be read, or the run has no such checkpoint."""
    model = stored_model(workdir)
    with checkpoints.reader(workdir) as manager:
        checkpoints.find_step(manager, checkpoint)
    return model.load_split(split)


def kept_path(workdir: pathlib.Path, split: str) -> pathlib.Path:
    """Returns where a review keeps a split's embeddings for the next."""
    return workdir / "reviews" / f"embeddings_{split}.npz"


def _same(first, second):
    arrays = ("caption_image", "image_id", "caption_id")
    return first.captions == second.captions and all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays
    )

"""The questions of a random sample, whose verdicts speak for all unlabelled pairs of a split."""

from __future__ import annotations

from fne_jax.false_negatives.review_app.questions import Question
from fne_jax.false_negatives.review_app.suspect_questions import model_name
from fne_jax.false_negatives.suspects import JudgedSplit
from fne_jax.false_negatives.verdict_fitting import split_inputs
from fne_jax.false_negatives.verdict_samples import sample


def questions_of_sample(judged: JudgedSplit, count: int, seed: int) -> list[Question]:
    """Returns a question for each pair of a sample, in random order.

    They tell nothing of how similar a model takes the two to be, which might sway who answers.

    Args:
      judged: The split.
      count: How many pairs.
      seed: The seed of the sample.
    """
    drawn = sample(split_inputs(judged), count, seed)
    model = model_name(judged.name, judged.step)
    name = f"{model}, {count} pairs, seed {seed}"
    return [
        Question(int(caption), int(image), model=model, sample=name, weight=float(weight))
        for caption, image, weight in zip(drawn.caption, drawn.image, drawn.weight, strict=True)
    ]

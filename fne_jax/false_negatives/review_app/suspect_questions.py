"""The questions that an audit's suspects are."""

from __future__ import annotations

from fne_jax.false_negatives.review_app.questions import Question
from fne_jax.false_negatives.suspects import JudgedSplit, Suspects


def questions_of(judged: JudgedSplit, suspects: Suspects, limit: int) -> list[Question]:
    """Returns a question for each of the first suspects.

    Args:
      judged: The split.
      suspects: All its suspects.
      limit: The most questions.
    """
    pairs, judgement = suspects.pairs[:limit], suspects.judgement[:limit]
    model = model_name(judged.name, judged.step)
    return [
        Question(
            caption=int(pairs.caption[index]),
            image=int(pairs.image[index]),
            similarity=float(pairs.similarity[index]),
            own_similarity=float(pairs.own_similarity[index]),
            probability=float(judgement.probability[index]),
            score=float(judgement.score[index]),
            nearest=-1 if judgement.evidence is None else int(judgement.evidence[index]),
            model=model,
        )
        for index in range(len(pairs.caption))
    ]


def model_name(name: str, step: int | None) -> str:
    """Returns how verdicts name a model."""
    return name if step is None else f"{name} step {step}"

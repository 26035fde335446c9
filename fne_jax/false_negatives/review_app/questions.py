"""What a reviewer is asked, group by group, and how far they have come.

A question is whether a caption fits an image. Questions stand in two kinds of groups: a caption
with the images that it may fit, or an image with the captions that may fit it. Groups come in the
order of their first questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from fne_jax.data.pairs import PairDataset
from fne_jax.data.verdicts import MATCH, NO_MATCH, UNSURE, SplitRows, Verdict

CAPTION, IMAGE = GROUPINGS = ("caption", "image")
ALL, UNJUDGED, DISPUTED = "all", "unjudged", "disputed"
# What a list can be narrowed to, by its name in an address, and what that is called on a page.
FILTERS: Mapping[str, str] = {
    UNJUDGED: "Unjudged",
    ALL: "All",
    MATCH: "Match",
    NO_MATCH: "No match",
    UNSURE: "Unsure",
    DISPUTED: "Disputed",
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A pair that a person is asked about.

    Attributes:
      caption: The row of the caption in its split.
      image: The row of the image.
      similarity: Their cosine by the model; None where it is not to be told.
      own_similarity: The caption's to its own image.
      probability: Of a match, by the detector; None where none was asked.
      score: By which the detector ranks pairs of one probability.
      nearest: The row of the image's own caption that is the nearest; -1 where none is known.
      model: The run and the step of the model that proposed the pair.
      sample: The name of the random sample that drew it, or "".
      weight: The inverse of the probability with which that sample drew it.
    """

    caption: int
    image: int
    similarity: float | None = None
    own_similarity: float | None = None
    probability: float | None = None
    score: float | None = None
    nearest: int = -1
    model: str = ""
    sample: str = ""
    weight: float | None = None

    @property
    def lead(self) -> float | None:
        """By how far the caption is more similar to the image than to its own."""
        if self.similarity is None or self.own_similarity is None:
            return None
        return self.similarity - self.own_similarity


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question and what has been said of it.

    Attributes:
      question: The question.
      own: The reviewer's own last verdict on it, or None.
      others: Those of the other reviewers.
    """

    question: Question
    own: Verdict | None
    others: Sequence[Verdict]

    def fits(self, name: str) -> bool:
        """Returns whether a key of `FILTERS` lets it pass."""
        if name == ALL:
            return True
        if name == UNJUDGED:
            return self.own is None
        if name == DISPUTED:
            said = {one.verdict for one in (*self.others, *([self.own] if self.own else []))}
            return {MATCH, NO_MATCH} <= said
        return self.own is not None and self.own.verdict == name


@dataclasses.dataclass(frozen=True)
class GroupPage:
    """A group as it is shown.

    Attributes:
      row: The row of the caption or of the image that the group is of.
      number: Its place among the groups that pass the filter, from 1.
      groups: How many groups pass.
      answered: Its questions that pass.
      previous: The row of the group before it that passes, or None.
      following: The row of the group after it that passes, or None.
    """

    row: int
    number: int
    groups: int
    answered: Sequence[Answered]
    previous: int | None
    following: int | None


class Questions:
    """The questions of a review.

    Args:
      dataset: The split that they are of.
      questions: At most one of each pair, in the order in which they are asked.
    """

    def __init__(self, dataset: PairDataset, questions: Sequence[Question]):
        self._questions = list(questions)
        self._by_pair = {(one.caption, one.image): one for one in questions}
        self._rows = SplitRows(dataset)
        self._groups: dict[str, dict[int, list[Question]]] = {name: {} for name in GROUPINGS}
        for one in questions:
            for by, groups in self._groups.items():
                groups.setdefault(group_row(one, by), []).append(one)

    def __len__(self) -> int:
        return len(self._questions)

    def find(self, caption: int, image: int) -> Question | None:
        """Returns the question of a caption's row and an image's, or None."""
        return self._by_pair.get((caption, image))

    def of_verdict(self, verdict: Verdict) -> Question | None:
        """Returns the question that a verdict of the split answers, or None.

        A question with a weight is answered within its sample alone: a verdict given elsewhere
        would be missing from it.
        """
        if self._rows.fault(verdict):
            return None
        question = self.find(*self._rows.pair(verdict))
        if question is None or (question.weight is not None and verdict.sample != question.sample):
            return None
        return question

    def answered(
        self, verdicts: Sequence[Verdict], reviewer: str
    ) -> dict[tuple[int, int], Answered]:
        """Returns all questions with their answers, by the rows of caption and image.

        Args:
          verdicts: Each reviewer's last verdict on each pair of the split.
          reviewer: Whose answers are `own`.
        """
        own: dict[tuple[int, int], Verdict] = {}
        others: dict[tuple[int, int], list[Verdict]] = {}
        for verdict in verdicts:
            question = self.of_verdict(verdict)
            if question is None:
                continue
            pair = question.caption, question.image
            if verdict.reviewer == reviewer:
                own[pair] = verdict
            else:
                others.setdefault(pair, []).append(verdict)
        return {
            pair: Answered(question, own.get(pair), others.get(pair, ()))
            for pair, question in self._by_pair.items()
        }

    def page(
        self, answered: Mapping[tuple[int, int], Answered], by: str, show: str, row: int | None
    ) -> GroupPage | None:
        """Returns a group, or where nothing of it passes the filter the next that does.

        Args:
          answered: What `answered` returned.
          by: One of `GROUPINGS`.
          show: A key of `FILTERS`.
          row: The row that the group is of; None for the first that passes.

        Returns:
          The group; the last that passes where none follows, and None where nothing passes.
        """
        groups = self._groups[by]
        passing = []
        wanted, reached = None, row is None or row not in groups
        for of, members in groups.items():
            reached = reached or of == row
            passed = [answered[one.caption, one.image] for one in members]
            passed = [one for one in passed if one.fits(show)]
            if not passed:
                continue
            if reached and wanted is None:
                wanted = len(passing)
            passing.append((of, passed))
        if not passing:
            return None
        index = len(passing) - 1 if wanted is None else wanted
        around = [passing[i][0] if 0 <= i < len(passing) else None for i in (index - 1, index + 1)]
        return GroupPage(passing[index][0], index + 1, len(passing), passing[index][1], *around)


def group_row(question: Question, by: str) -> int:
    """Returns the row of the caption or of the image that a question's group is of."""
    return question.caption if by == CAPTION else question.image


def counts(answered: Mapping[tuple[int, int], Answered]) -> dict[str, int]:
    """Returns how many questions pass each of `FILTERS`."""
    return {name: sum(one.fits(name) for one in answered.values()) for name in FILTERS}

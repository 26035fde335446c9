"""What a reviewer is asked, group by group, and how far they have come.

A question is whether a caption fits an image. Questions stand in groups: a caption with the images
that it may fit, or an image with the captions that may fit it. Groups come in the order of their
first questions. Those of a random sample come in parts, in the order in which they were drawn: by
caption, what is judged of a sample before somebody stops would be none, since captions that say
little fit many images, and would come early.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fne_jax.data.pairs import PairDataset
from fne_jax.data.verdicts import MATCH, NO_MATCH, UNSURE, SplitRows, Verdict, moment

CAPTION, IMAGE, PART = "caption", "image", "part"
_PART_SIZE = 20
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


def verdict_on(
    question: Question,
    dataset: PairDataset,
    split: str,
    verdict: str = "",
    reviewer: str = "",
    time: str = "",
) -> Verdict:
    """Returns a verdict on the pair of a question, by default one that is yet to be given.

    The verdict is one of `WORDS`, and the time as in `Verdict`.
    """
    return Verdict(
        split=split,
        image_id=int(dataset.image_id[question.image]),
        caption_id=int(dataset.caption_id[question.caption]),
        source_image_id=str(dataset.source_image_id[question.image]),
        caption=dataset.captions[question.caption],
        verdict=verdict,
        reviewer=reviewer,
        time=time,
        model=question.model,
        score=question.probability,
        sample=question.sample,
        weight=question.weight,
    )


class Answered:
    """A question and what has been said of it.

    A question of a weighted sample is answered within the sample alone: a verdict given elsewhere
    would be missing from it. Who has answered it there may change their mind anywhere.

    Attributes:
      question: The question.
      own: The reviewer's own last verdict on it, or None.
    """

    def __init__(self, question: Question, reviewer: str):
        self.question, self.own = question, None
        self._reviewer = reviewer
        # By reviewer and sample; the last of a sample counts, whatever the clock said.
        self._said: dict[str, dict[str, Verdict]] = {}

    def add(self, verdict: Verdict) -> None:
        """Takes up a verdict; of one reviewer's on several samples the latest counts."""
        said = self._said.setdefault(verdict.reviewer, {})
        said.pop(verdict.sample, None)
        said[verdict.sample] = verdict
        self.own = self._by_reviewer().get(self._reviewer)

    @property
    def others(self) -> list[Verdict]:
        """The last verdicts of the other reviewers."""
        said = self._by_reviewer()
        return [said[name] for name in sorted(said.keys() - {self._reviewer})]

    def _by_reviewer(self):
        return {
            name: max(reversed(said.values()), key=lambda one: moment(one.time))
            for name, said in self._said.items()
            if self.question.weight is None or self.question.sample in said
        }

    def fits(self, name: str) -> bool:
        """Returns whether a key of `FILTERS` lets it pass."""
        if name == ALL:
            return True
        if name == UNJUDGED:
            return self.own is None
        if name == DISPUTED:
            return {MATCH, NO_MATCH} <= {one.verdict for one in self._by_reviewer().values()}
        return self.own is not None and self.own.verdict == name


class Answers:
    """What has been said of all questions; another verdict takes no longer the more there are.

    Attributes:
      of: Each question with its answers, by the rows of caption and image.
      counts: How many questions pass each of `FILTERS`.
    """

    def __init__(self, questions: Questions, verdicts: Iterable[Verdict], reviewer: str):
        self._questions = questions
        self.of = {(one.caption, one.image): Answered(one, reviewer) for one in questions}
        self.counts = dict.fromkeys(FILTERS, 0) | dict.fromkeys((ALL, UNJUDGED), len(questions))
        for verdict in verdicts:
            self.add(verdict)

    def add(self, verdict: Verdict) -> None:
        """Takes up a verdict, which may be of a pair that is not asked."""
        question = self._questions.of_verdict(verdict)
        if question is None:
            return
        answered = self.of[question.caption, question.image]
        before = [answered.fits(name) for name in FILTERS]
        answered.add(verdict)
        for name, fitted in zip(FILTERS, before, strict=True):
            self.counts[name] += answered.fits(name) - fitted


@dataclasses.dataclass(frozen=True)
class GroupPage:
    """A group as it is shown.

    Attributes:
      row: The row of the caption or of the image that the group is of, or the number of the part.
      number: Its place among all groups, from 1; what is judged meanwhile does not change it.
      groups: How many groups there are.
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

    There is at most one of each pair, in the order in which they are asked.

    Attributes:
      groupings: In which groups they can be shown: by caption and by image, or those of a random
        sample in parts.
    """

    def __init__(self, dataset: PairDataset, questions: Sequence[Question]):
        self._by_pair = {(one.caption, one.image): one for one in questions}
        self._rows = SplitRows(dataset)
        drawn = any(one.weight is not None for one in questions)
        self.groupings = (PART,) if drawn else (CAPTION, IMAGE)
        self._groups: dict[str, dict[int, list[Question]]] = {by: {} for by in self.groupings}
        self._group_row: dict[tuple[str, Question], int] = {}
        for number, one in enumerate(questions):
            rows = {CAPTION: one.caption, IMAGE: one.image, PART: number // _PART_SIZE}
            for by, groups in self._groups.items():
                self._group_row[by, one] = rows[by]
                groups.setdefault(rows[by], []).append(one)

    def __len__(self) -> int:
        return len(self._by_pair)

    def __iter__(self) -> Iterator[Question]:
        return iter(self._by_pair.values())

    def find(self, caption: int, image: int) -> Question | None:
        """Returns the question of a caption's row and an image's, or None."""
        return self._by_pair.get((caption, image))

    def of_verdict(self, verdict: Verdict) -> Question | None:
        """Returns the question on the pair of a verdict of the split, or None."""
        return None if self._rows.fault(verdict) else self.find(*self._rows.pair(verdict))

    def group_row(self, question: Question, by: str) -> int:
        """Returns the `GroupPage.row` of a question's group."""
        return self._group_row[by, question]

    def page(self, answers: Answers, by: str, show: str, row: int | None) -> GroupPage | None:
        """Returns a group, or where nothing of it passes the filter the next that does.

        It is a group of one of `groupings`, shown by a key of `FILTERS`; the row is its
        `GroupPage.row`, None for the first that passes.

        Returns:
          The group; the last that passes where none follows, and None where nothing passes.
        """
        groups = self._groups[by]
        rows = list(groups)

        def passing(numbers: Iterable[int]) -> Iterator[tuple[int, list[Answered]]]:
            for number in numbers:
                members = (answers.of[one.caption, one.image] for one in groups[rows[number]])
                if passed := [one for one in members if one.fits(show)]:
                    yield number, passed

        start = rows.index(row) if row in groups else 0
        found = next(passing([*range(start, len(rows)), *range(start - 1, -1, -1)]), None)
        if found is None:
            return None
        number, passed = found
        around = range(number - 1, -1, -1), range(number + 1, len(rows))
        previous, following = (next(passing(numbers), None) for numbers in around)
        return GroupPage(
            rows[number], number + 1, len(rows), passed,
            previous and rows[previous[0]], following and rows[following[0]],
        )  # fmt: skip

"""Groups, filters and the way from one group to the next, against plain versions."""

import dataclasses

import pytest

from fne_jax.data.verdicts import Verdict
from fne_jax.false_negatives.review_app import questions as lib
from fne_jax.false_negatives.review_app.questions import Answers, Question, Questions
from tests.support.pages import hostile_split

# Of captions 3, 0 and 5, and of images 1, 4 and 6.
PAIRS = [(3, 4), (0, 1), (3, 6), (5, 4), (0, 4), (3, 2)]
SPLIT = hostile_split()


def said(pair, verdict, reviewer="anna"):
    caption, image = pair
    return Verdict("train", int(SPLIT.image_id[image]), int(SPLIT.caption_id[caption]), "",
                   SPLIT.captions[caption], verdict, reviewer)  # fmt: skip


@pytest.fixture
def asked():
    return Questions(SPLIT, [Question(*pair) for pair in PAIRS])


VERDICTS = [
    said((0, 1), "match"),
    said((0, 4), "no_match"),
    said((3, 6), "match"),
    said((3, 6), "no_match", "bert"),
    said((5, 4), "match", "bert"),
    said((1, 1), "match"),  # of another list
    dataclasses.replace(said((3, 4), "match"), caption="before it was corrected"),
]


def test_what_is_judged_is_what_the_reviewer_judged(asked):
    assert Answers(asked, VERDICTS, "anna").counts == {
        "unjudged": 3, "all": 6, "match": 2, "no_match": 1, "unsure": 0, "disputed": 1,
    }  # fmt: skip
    assert Answers(asked, VERDICTS, "bert").counts["unjudged"] == 4
    assert Answers(asked, VERDICTS, "carl").counts["unjudged"] == 6
    assert asked.find(0, 1) and asked.find(1, 0) is None


@pytest.mark.parametrize(
    ("by", "show", "groups"),
    [
        ("caption", "all", {3: [(3, 4), (3, 6), (3, 2)], 0: [(0, 1), (0, 4)], 5: [(5, 4)]}),
        ("image", "all", {4: [(3, 4), (5, 4), (0, 4)], 1: [(0, 1)], 6: [(3, 6)], 2: [(3, 2)]}),
        ("caption", "unjudged", {3: [(3, 4), (3, 2)], 5: [(5, 4)]}),
        ("image", "unjudged", {4: [(3, 4), (5, 4)], 2: [(3, 2)]}),
        ("caption", "match", {3: [(3, 6)], 0: [(0, 1)]}),
        ("caption", "disputed", {3: [(3, 6)]}),
        ("image", "unsure", {}),
    ],
)
def test_groups_in_order(asked, by, show, groups):
    answers = Answers(asked, VERDICTS, "anna")
    seen, row = {}, None
    order = list(dict.fromkeys(pair[by == "image"] for pair in PAIRS))
    while True:
        page = asked.page(answers, by, show, row)
        if page is None:
            break
        # The place among all, which stays while one judges.
        assert (page.number, page.groups) == (order.index(page.row) + 1, len(order))
        assert page.previous == (list(seen)[-1] if seen else None)
        seen[page.row] = [(one.question.caption, one.question.image) for one in page.answered]
        row = page.following
        if row is None:
            break
    assert seen == groups and list(seen) == list(groups)


def test_a_group_that_is_done_leads_to_the_next(asked):
    def page(by, show, row):
        return asked.page(Answers(asked, VERDICTS, "anna"), by, show, row).row

    assert page("caption", "unjudged", 0) == 5  # which follows 0
    assert page("image", "unjudged", 6) == 2
    assert page("image", "match", 2) == 6  # nothing follows: the last
    assert page("caption", "all", 11) == 3  # of another list: the first


def test_a_sample_is_answered_by_what_it_asked_alone():
    drawn = [Question(3, 4, sample="strata", weight=2.5), Question(0, 1, sample="evaluation")]
    answers = Answers(
        Questions(SPLIT, drawn), [said((3, 4), "match"), said((0, 1), "match")], "anna"
    )
    assert answers.of[3, 4].own is None and answers.of[0, 1].own is not None
    within = dataclasses.replace(said((3, 4), "unsure"), sample="strata", weight=2.5)
    later = said((3, 4), "no_match")
    for verdict in (within, later):  # who has answered may change their mind anywhere
        answers.add(verdict)
        assert answers.of[3, 4].own == verdict
    assert [answers.counts[name] for name in ("all", "match", "no_match", "unsure")] == [2, 1, 1, 0]


def test_a_changed_mind_counts_even_where_the_clock_was_set_back(asked):
    first, second = (dataclasses.replace(said((0, 1), word), time=f"2026-01-01T0{hour}:00:00Z")
                     for word, hour in (("match", 2), ("no_match", 1)))  # fmt: skip
    assert Answers(asked, [first, second], "anna").of[0, 1].own == second


def test_a_sample_is_asked_in_the_order_of_the_draw(monkeypatch):
    monkeypatch.setattr(lib, "_PART_SIZE", 4)
    asked = Questions(SPLIT, [Question(*pair, sample="strata", weight=2.5) for pair in PAIRS])
    assert asked.groupings == ("part",)
    answers, seen = Answers(asked, [], "anna"), []
    for row in (0, 1):
        page = asked.page(answers, "part", "unjudged", row)
        assert (page.row, page.groups) == (row, 2)
        seen += [(one.question.caption, one.question.image) for one in page.answered]
    assert seen == PAIRS and asked.group_row(asked.find(*PAIRS[5]), "part") == 1

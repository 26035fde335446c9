"""How good a judge is, and what its verdicts tell once people have judged some of its pairs."""

import dataclasses

import numpy as np
import pytest

from fne_jax.data.pair_columns import Pairs
from fne_jax.data.verdicts import MATCH, NO_MATCH, UNSURE, Verdict
from fne_jax.false_negatives import verdict_fitting
from fne_jax.false_negatives.verdict_judges import describe, reviewers
from fne_jax.false_negatives.verdict_samples import density

JUDGE = {"reviewer": "llm", "instructions": "1a2b"}


def verdict(pair, is_match, **changes):
    return Verdict("val", pair, pair, "", "x", MATCH if is_match else NO_MATCH, **changes)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_judge_is_measured_by_people(drawn):
    truth = np.arange(60) < 10
    called = truth.copy()
    called[[0, 1, 20, 21, 22]] ^= True  # misses two, makes up three
    weight = np.where(np.arange(60) % 2, 1.0, 30.0)

    def weighed(pair):
        return {"sample": "s", "weight": weight[pair]} if drawn else {}

    people = [verdict(pair, truth[pair], reviewer="ann", **weighed(pair)) for pair in range(50)]
    judged = [verdict(pair, called[pair], **JUDGE, **weighed(pair)) for pair in range(60)]
    judged[49] = dataclasses.replace(judged[49], verdict=UNSURE)
    # Pairs that people judged for another reason are no part of a sample.
    more = [verdict(59, False, reviewer="bob"), verdict(58, True, reviewer="bob")] if drawn else []
    judge, ann = reviewers([*people, *judged, *more])[:2]
    assert ann == {"reviewer": "ann", "instructions": "", "verdicts": 50}
    assert judge["verdicts"] == 60 and judge["common"] == 49
    share = weight if drawn else np.ones(60)
    for name, of in (("true_positive_rate", truth), ("false_positive_rate", ~truth)):
        among = of & (np.arange(60) < 49)
        rate = judge[name]
        assert rate["value"] == pytest.approx(np.average(called[among], weights=share[among]))
        assert 0 < rate["low"] < rate["value"] < rate["high"] < 1
    told = describe([judge, ann])
    assert told.startswith("verdicts of people: ann 50\nverdicts of the judge llm, instructions 1a")
    assert "60; on 49 that people judged too, true-positive rate" in told


def test_a_judge_whom_nobody_has_checked():
    (judge,) = reviewers([verdict(3, True, **JUDGE)])
    told = describe([judge])
    assert judge["common"] == 0 and judge["true_positive_rate"] is None
    assert "verdicts of people: none\n" in told and "1; nobody has judged any of these" in told
    (_, judge) = reviewers([verdict(3, False, reviewer="ann"), verdict(3, False, **JUDGE)])
    told = describe([judge])
    assert "true-positive rate unknown, false-positive rate 0.0% (0.0% to 95.0%" in told
    many = [verdict(number, True, reviewer=f"r{number}") for number in range(9)]
    assert describe(reviewers(many)).endswith("r4 1, 4 more")


def test_what_judges_say_is_corrected_by_people():
    rng, covered, values, widths = np.random.default_rng(0), 0, [], []
    for _ in range(100):
        truth = rng.random(2000) < 0.05
        called = rng.random(2000) < np.where(truth, 0.9, 0.005)
        pairs = Pairs(np.arange(2000), np.arange(2000), weight=np.full(2000, 500.0),
                      sample=np.full(2000, "s"))  # fmt: skip
        by_judge, by_people = pairs.replace(is_match=called), pairs.replace(is_match=truth)[:300]
        share = density(called, pairs.weight)
        found = verdict_fitting.corrected_density(share, by_people, by_judge)
        values.append(found.value)
        covered += found.low <= 0.05 <= found.high
        alone = density(by_people.is_match, by_people.weight)
        widths.append((found.high - found.low, alone.high - alone.low))
    corrected, alone = np.mean(widths, axis=0)
    assert corrected < 0.85 * alone
    assert np.mean(values) == pytest.approx(0.05, abs=0.003) and covered >= 90
    told = verdict_fitting.describe_density(by_people, by_judge)
    assert "2,000 verdicts of judges" in told and "corrected by what people say" in told
    told = verdict_fitting.describe_density(by_people[:0], by_judge)
    assert "no person's verdict" in told and "judge some of their sample yourself" in told

"""Whose verdicts count, and how well those of judges agree with people's.

A judge is a reviewer who answers by instructions, such as a model. On pairs that people have judged
too it has a true-positive rate, the share of their matches that it calls a match, and a
false-positive rate, the share of the others that it does. Where people judged them in a random
sample the pairs have its weights, so that the rates are those among all unlabelled pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fne_jax.data.verdicts import MATCH, Verdict, agreed, weights_of
from fne_jax.false_negatives.verdict_samples import density

_RATES = {
    "true_positive_rate": ("true-positive rate", True),
    "false_positive_rate": ("false-positive rate", False),
}
# People who are named; of more, those with the most verdicts.
_NAMED = 5


def reviewers(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Returns who gave verdicts, the most first, and how well each judge agrees with people.

    Of `verdicts` there is each reviewer's last on each of its pairs in each sample.

    Returns:
      Of each `reviewer` with `instructions`, which are "" for a person, the number of pairs,
      `verdicts`. Of a judge also `common`, the number of those that are compared with people's,
      and `true_positive_rate` and `false_positive_rate` on them, as `Density` or None of none.
    """
    given: dict[tuple[str, str], list[Verdict]] = {}
    for one in verdicts:
        given.setdefault((one.reviewer, one.instructions), []).append(one)
    by_people = [one for one in verdicts if not one.instructions]
    people, weights, found = _is_match(by_people), weights_of(by_people), []
    for (name, instructions), theirs in given.items():
        number = len({one.pair for one in theirs})
        of = {"reviewer": name, "instructions": instructions, "verdicts": number}
        found.append(of | (_agreement(_is_match(theirs), people, weights) if instructions else {}))
    return sorted(found, key=lambda of: -of["verdicts"])


def describe(found: Sequence[dict[str, Any]]) -> str:
    """Returns what `reviewers` found, as lines for a terminal."""
    people = [of for of in found if not of["instructions"]]
    named = [f"{of['reviewer'] or 'unnamed'} {of['verdicts']:,}" for of in people[:_NAMED]]
    named += [f"{len(people) - _NAMED:,} more"] if len(people) > _NAMED else []
    lines = [f"verdicts of people: {', '.join(named) or 'none'}"]
    for of in (one for one in found if one["instructions"]):
        agreement = "nobody has judged any of these pairs, so how good it is is not known"
        if of["common"]:
            rates = (f"{name} {_text(of[key])}" for key, (name, _) in _RATES.items())
            agreement = f"on {of['common']:,} that people judged too, {', '.join(rates)}"
        lines.append(
            f"verdicts of the judge {of['reviewer']}, instructions {of['instructions']}: "
            f"{of['verdicts']:,}; {agreement}"
        )
    return "\n".join(lines)


def _text(rate):
    if rate is None:
        return "unknown"
    return f"{rate['value']:.1%} ({rate['low']:.1%} to {rate['high']:.1%}, 95 % interval)"


def _is_match(verdicts):
    return {one.pair: one.verdict == MATCH for one in agreed(verdicts)}


def _agreement(said, people, weights):
    """Returns the fields of a judge, by what it and what people say of pairs."""
    common = [pair for pair in said if pair in people]
    common = [pair for pair in common if pair in weights] or common
    if not common:
        return {"common": 0} | dict.fromkeys(_RATES)
    rows = [
        (people[pair], said[pair], sample, weight)
        for pair in common
        for sample, weight in weights.get(pair, {"": 1.0}).items()
    ]
    true, called, sample, weight = map(np.array, zip(*rows, strict=True))
    _, row = np.unique(sample, return_inverse=True)
    # Far above 1, since these are few of all the pairs on which the judge could be measured.
    weight = 1e12 * weight / np.bincount(row, weight)[row]
    rates = {}
    for key, (_, kind) in _RATES.items():
        among = true == kind
        rates[key] = (
            dataclasses.asdict(density(called[among], weight[among], sample[among]))
            if among.any()
            else None
        )
    return {"common": len(common)} | rates

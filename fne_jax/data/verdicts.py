"""What people say of pairs of a caption and an image, as CSV and as JSON lines.

A verdict is one reviewer's answer on one pair; a hash of instructions tells a judge, such as a
model, from a person. Both formats have the fields of `Verdict`; in a CSV an empty cell stands for
what there is not, and its texts are safe in a spreadsheet.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import logging
import math
import pathlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.data.pairs import SPLITS, PairDataset, portable_name
from fne_jax.data.tables import cell_text, read_rows, safe_cell
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, expand_home, write_atomically

MATCH, NO_MATCH, UNSURE = WORDS = ("match", "no_match", "unsure")
# Other words for an answer, as those who are asked a question give it.
_ANSWERS = {"yes": MATCH, "no": NO_MATCH}
_SUFFIXES = (".csv", ".jsonl")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A reviewer's answer on a pair.

    Attributes:
      split: `train`, `val` or `test`.
      image_id: `PairDataset.image_id` of the image.
      caption_id: `PairDataset.caption_id` of the caption.
      source_image_id: The name of the image in its source, "" if that is not known. It and the
        caption tell whether a verdict is on this pair, or on another that had its ids.
      caption: The text of the caption.
      verdict: One of `WORDS`.
      reviewer: Who says so.
      time: When, in ISO 8601 with its offset from UTC; "" if that is not known.
      model: The run and the step of the model that proposed the pair, or "".
      score: The probability of a match by the detector that proposed it, or None.
      sample: The name of the random sample that drew the pair, or "".
      weight: The inverse of the probability with which that sample drew it; None if none did.
      probability: Of a match, as a judge says; None where it says no more than a word.
      instructions: A hash of the instructions that a judge had; "" of a person.
    """

    split: str
    image_id: int
    caption_id: int
    source_image_id: str
    caption: str
    verdict: str
    reviewer: str = ""
    time: str = ""
    model: str = ""
    score: float | None = None
    sample: str = ""
    weight: float | None = None
    probability: float | None = None
    instructions: str = ""

    @property
    def pair(self) -> tuple[str, int, int]:
        """The split and the ids of image and caption."""
        return self.split, self.image_id, self.caption_id


FIELDS = tuple(field.name for field in dataclasses.fields(Verdict))
_REQUIRED = ("split", "image_id", "caption_id", "caption")


def write_verdicts(path: pathlib.Path, verdicts: Iterable[Verdict]) -> None:
    """Writes verdicts, whole or not at all.

    Args:
      path: The file, `.csv` or `.jsonl`; what was there is replaced.
      verdicts: The verdicts, which are written in their order.

    Raises:
      UserError: if the file is of another kind, or cannot be written.
    """
    rows = [dataclasses.asdict(verdict) for verdict in verdicts]
    if _suffix(path) == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(FIELDS)
        writer.writerows([safe_cell(value) for value in row.values()] for row in rows)
        # Without a byte order mark Excel reads UTF-8 as the system's own encoding.
        content = "\N{BYTE ORDER MARK}" + stream.getvalue()
    with as_user_error(f"{path}: cannot be written"):
        write_atomically(path, content.encode())


def read_verdicts(
    path: pathlib.Path, dataset: PairDataset | None = None, split: str | None = None
) -> list[Verdict]:
    """Returns the verdicts of a file, of each reviewer the last one on each pair of each sample.

    The last is that of the latest time, and of equal times that which stands last in the file.

    Args:
      path: A `.csv` or `.jsonl`, as `write_verdicts` writes it. Columns beyond a verdict's are
        passed over, and all but the split, the ids, the caption and the verdict may be missing. A
        judge's probability of a match does for its verdict.
      dataset: The split that the verdicts are of; those on other pairs are set aside with a
        warning. None to keep all.
      split: The name of the split whose verdicts are wanted, the others being left out; None for
        all of them.

    Raises:
      UserError: naming the file and the line, if it cannot be read; if none of its verdicts is on
        the split, or on a pair of the dataset.
    """
    others: Counter[str] = Counter()
    last: dict[tuple[str | int, ...], tuple[float, Verdict]] = {}
    repeated = []
    kind = _suffix(path).removeprefix(".")
    for where, cells in read_rows(path, kind, _REQUIRED, FIELDS):
        if kind == "csv":
            cells = {name: cell and cell_text(cell) for name, cell in cells.items()}
        try:
            verdict, seconds = _verdict(cells)
            if split is not None and verdict.split != split:
                others[verdict.split] += 1
                continue
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        key = (*verdict.pair, verdict.reviewer, verdict.sample)
        if key in last:
            repeated.append(where)
        if key not in last or seconds >= last[key][0]:
            last.pop(key, None)  # so that the order is that of what counts
            last[key] = seconds, verdict
    if split is not None and not last:
        refuse_other_splits(path, split, others)
    if repeated:
        _log.warning(
            "%s: a row before it has this reviewer and this pair too, of which the latest counts; "
            "so have %d rows in all", repeated[0], len(repeated),
        )  # fmt: skip
    found = [verdict for _, verdict in last.values()]
    return found if dataset is None else on_pairs_of(dataset, found, path, refuse=True)


def on_pairs_of(
    dataset: PairDataset, verdicts: Sequence[Verdict], path: pathlib.Path, *, refuse: bool = False
) -> list[Verdict]:
    """Returns the verdicts that are on pairs of a split; a warning counts what is set aside.

    They are from a file, and on a split of that name. Raises UserError if all would be set aside,
    where that is to be refused.
    """
    rows = SplitRows(dataset)
    faults = [rows.fault(verdict) for verdict in verdicts]
    kept = [verdict for verdict, fault in zip(verdicts, faults, strict=True) if not fault]
    if len(kept) < len(verdicts):
        example = next(filter(None, faults))
        if refuse and not kept:
            raise UserError(
                f"{path}: none of its {len(faults):,} verdicts is of this data: {example}"
            )
        _log.warning(
            "%s: %d of %d verdicts are of other data and do not count: %s. To drop them, `review "
            "--export` them and `--import` the file into another --store",
            path, len(faults) - len(kept), len(faults), example,
        )  # fmt: skip
    return kept


def refuse_other_splits(path: pathlib.Path, split: str, others: Mapping[str, int]) -> None:
    """Raises UserError if a file without a verdict on a split has `others`, counted by split."""
    if others:
        found = " and ".join(f"{number:,} on {name}" for name, number in others.items())
        raise UserError(f"{path}: expected verdicts on the split {split}, got {found}")


def opinions(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Returns each reviewer's latest verdict on each pair, of whatever sample.

    What judges say of a pair that a person has judged is left out. Of two verdicts of the same time
    the later in the sequence counts.
    """
    latest: dict[tuple[str | int, ...], Verdict] = {}
    for one in verdicts:
        before = latest.setdefault((*one.pair, one.reviewer), one)
        if moment(one.time) >= moment(before.time):
            latest[*one.pair, one.reviewer] = one
    by_people = {one.pair for one in latest.values() if not one.instructions}
    return [one for one in latest.values() if not one.instructions or one.pair not in by_people]


def agreed(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Returns one verdict on each pair that more reviewers call a match than not, or the reverse.

    Those who are unsure do not vote, and pairs with as many votes for as against are left out. It
    is the first verdict of the majority.
    """
    of_pair: dict[tuple[str, int, int], list[Verdict]] = {}
    for verdict in opinions(verdicts):
        of_pair.setdefault(verdict.pair, []).append(verdict)
    found = []
    for votes in of_pair.values():
        count = Counter(vote.verdict for vote in votes)
        if count[MATCH] != count[NO_MATCH]:
            word = MATCH if count[MATCH] > count[NO_MATCH] else NO_MATCH
            found.append(next(vote for vote in votes if vote.verdict == word))
    return found


def weights_of(verdicts: Iterable[Verdict]) -> dict[tuple[str, int, int], dict[str, float]]:
    """Returns the weight of each pair in each sample that drew it, whoever judged it there."""
    drawn: dict[tuple[str, int, int], dict[str, float]] = {}
    for one in verdicts:
        if one.weight is not None:
            drawn.setdefault(one.pair, {}).setdefault(one.sample, one.weight)
    return drawn


def pairs_of(verdicts: Sequence[Verdict], dataset: PairDataset) -> Pairs:
    """Returns the [n] pairs that [n] verdicts are on, in the split's rows.

    Raises UserError if a verdict is of another dataset.
    """
    rows = SplitRows(dataset)
    for verdict in verdicts:
        if fault := rows.fault(verdict):
            raise UserError(f"verdict: {fault}")
    pairs = np.array([rows.pair(verdict) for verdict in verdicts], np.int64).reshape(-1, 2)
    return Pairs(pairs[:, 0], pairs[:, 1])


def refuted_labels(file: str, train: PairDataset) -> Pairs:
    """Returns the labelled pairs of the training split that most reviewers call no match.

    Verdicts on unlabelled pairs do not count. Raises UserError if the file, `config.data.refuted`,
    cannot be read, is of other data, or refutes no labelled pair.
    """
    path = pathlib.Path(expand_home(file))
    found = agreed(read_verdicts(path, train, "train"))
    pairs = pairs_of([one for one in found if one.verdict == NO_MATCH], train)
    pairs = pairs[train.caption_image[pairs.caption] == pairs.image]
    if not len(pairs):
        raise UserError(
            f"{path}: refutes no caption of its own image in the training split; expected verdicts "
            "that `review --labels` has asked for"
        )
    return pairs


class SplitRows:
    """The rows of a split's captions and images by their ids."""

    def __init__(self, dataset: PairDataset):
        self.captions, self.names = dataset.captions, dataset.image_names
        self.caption = {int(one): row for row, one in enumerate(dataset.caption_id)}
        self.image = {int(one): row for row, one in enumerate(dataset.image_id)}

    def pair(self, verdict: Verdict) -> tuple[int, int]:
        """Returns the rows of caption and image of a verdict without a fault."""
        return self.caption[verdict.caption_id], self.image[verdict.image_id]

    def fault(self, verdict: Verdict) -> str:
        """Returns why a verdict is not on a pair of the split, or "" if it is."""
        for name, rows in (("caption_id", self.caption), ("image_id", self.image)):
            value = getattr(verdict, name)
            if value not in rows:
                return f"{name} {value} is not among the {len(rows):,} of the split"
        text = self.captions[self.caption[verdict.caption_id]]
        # Most are equal as they are, and of many verdicts spelling takes long.
        if verdict.caption != text and _one_spelling(verdict.caption) != _one_spelling(text):
            return (
                f"caption {verdict.caption_id} was {verdict.caption!r:.80}, and is {text!r:.80} now"
            )
        name = self.names[self.image[verdict.image_id]]
        told = verdict.source_image_id and portable_name(verdict.source_image_id)
        if told and _one_spelling(told) != _one_spelling(name):
            return f"image {verdict.image_id} was {verdict.source_image_id!r}, and is {name!r} now"
        return ""


def _one_spelling(text):
    """Returns a text as any program may save it: without NUL, other line ends, another form."""
    return " ".join(unicodedata.normalize("NFC", cell_text(safe_cell(text))).split())


def _suffix(path):
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: expected a file of verdicts, {' or '.join(_SUFFIXES)}")
    return path.suffix


def _verdict(cells) -> tuple[Verdict, float]:
    """Returns the verdict of a line and when it was given, in seconds; ValueError if damaged."""
    missing = [name for name in _REQUIRED if cells.get(name) in (None, "")]
    if cells.get("verdict") in (None, "") and cells.get("probability") in (None, ""):
        missing.append("verdict")
    if missing:
        raise ValueError(f"{', '.join(missing)}: not there")
    values = {
        name: _PARSERS.get(name, _text)(name, cells[name])
        for name in FIELDS
        if cells.get(name) not in (None, "")
    }
    if {"probability", "instructions"} & values.keys() and not (
        {"reviewer", "instructions"} <= values.keys()
    ):
        raise ValueError(
            "a judge's verdict takes its name as `reviewer` and a hash of its instructions as "
            "`instructions`"
        )
    chance = values.get("probability")
    word = values.get("verdict") or (
        UNSURE if chance == 0.5 else MATCH if chance > 0.5 else NO_MATCH
    )
    values["verdict"] = _ANSWERS.get(word, word)
    if values["verdict"] not in WORDS:
        raise ValueError(f"verdict is {word!r}; expected one of {', '.join((*WORDS, *_ANSWERS))}")
    if values["split"] not in SPLITS:
        raise ValueError(f"split is {values['split']!r}; expected one of {', '.join(SPLITS)}")
    verdict = Verdict(**{"source_image_id": "", **values})
    return verdict, moment(verdict.time)


def moment(time: str) -> float:
    """Returns when a verdict was given, in seconds; before all others where that is not known.

    Raises ValueError if the text is no time with an offset.
    """
    if not time:
        return -math.inf
    try:
        parsed = datetime.datetime.fromisoformat(time)
    except ValueError:
        parsed = None
    if parsed is None or parsed.tzinfo is None:
        raise ValueError(
            f"time is {time!r}; expected ISO 8601 with its offset, such as 2026-05-04T12:30:00Z"
        )
    return parsed.timestamp()


def _text(name, value):
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; expected a string")
    return value


def _integer(name, value):
    try:
        if type(value) not in (int, str):
            raise ValueError
        return int(value)
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}; expected an integer") from error


def _number(least: float, most: float) -> Callable[[str, Any], float]:
    """Returns what reads a number from `least` to `most`."""

    def read(name: str, value: Any) -> float:
        try:
            if type(value) not in (int, float, str):
                raise ValueError
            # Where lists are separated by semicolons, numbers have a decimal comma.
            number = float(str(value).replace(",", "."))
        except ValueError as error:
            raise ValueError(f"{name} is {value!r}; expected a number or nothing") from error
        if not least <= number <= most:
            raise ValueError(f"{name} is {value!r}; expected {least:g} to {most:g}")
        return number

    return read


_PARSERS = {
    "image_id": _integer,
    "caption_id": _integer,
    "score": _number(0, 1),
    "weight": _number(1, 1e18),
    "probability": _number(0, 1),
}

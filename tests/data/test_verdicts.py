"""Verdicts come back as they were written, and a damaged file is told by its line."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest

from fne_jax.data import verdicts as verdicts_lib
from fne_jax.data.pairs import PairDataset
from fne_jax.data.tables import cell_text, safe_cell
from fne_jax.data.verdicts import (
    FIELDS,
    Verdict,
    agreed,
    opinions,
    pairs_of,
    read_verdicts,
    write_verdicts,
)
from fne_jax.errors import UserError
from fne_jax.false_negatives.verdict_store import VerdictStore, read_any

CAPTIONS = ["=1+1", 'a "dog",\r\nrunning', "-5 Grad, Schnee \N{SNOWFLAKE}", "'=x", "nul \0 here"]
DATASET = PairDataset(
    captions=CAPTIONS,
    caption_image=np.array([0, 0, 1, 2, 2], np.int32),
    image_id=np.array([30, 10, 20], np.int32),
    images=np.zeros((3, 1, 1, 3), np.uint8),
    caption_id=np.array([7, 5, 9_000_000_000, 4, 6]),
    source_image_id=["a", "+b", "c"],
)


def verdict(caption, image, word="match", **changes):
    settings = {
        "split": "train",
        "image_id": int(DATASET.image_id[image]),
        "caption_id": int(DATASET.caption_id[caption]),
        "source_image_id": DATASET.source_image_id[image],
        "caption": CAPTIONS[caption],
        "verdict": word,
        "reviewer": "ann",
        "time": "2026-11-22T00:30:00Z",
    }
    return Verdict(**(settings | changes))


SOME = [
    verdict(0, 1, model="run 780", score=0.25, sample="first", weight=1234.5),
    verdict(1, 2, "no_match", reviewer="@bob", time="2026-11-22T01:30:00+01:00"),
    verdict(2, 0, "unsure", time="", probability=0.5, instructions="1a2b"),
    verdict(3, 0, "no_match", split="val"),
]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_verdicts_come_back_as_they_were(tmp_path, kind):
    path = tmp_path / f"verdicts.{kind}"
    write_verdicts(path, SOME)
    assert read_verdicts(path, DATASET) == SOME
    assert read_verdicts(path, DATASET, split="val") == SOME[3:]
    # A spreadsheet cannot hold NUL; the file is still that of the dataset.
    write_verdicts(path, [verdict(4, 1)])
    assert len(read_verdicts(path, DATASET)) == 1
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("delimiter", "encoding"), [(";", "utf-8-sig"), ("\t", "utf-16")])
def test_what_a_spreadsheet_saves_again_is_read(tmp_path, delimiter, encoding):
    path = tmp_path / "verdicts.csv"
    write_verdicts(path, SOME)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = [[cell.replace("\r\n", "\n") for cell in row] for row in csv.reader(stream)]
    if delimiter == ";":  # where numbers have a decimal comma
        rows[1][FIELDS.index("score")] = "0,25"
    with path.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    found = read_verdicts(path, DATASET)
    assert [dataclasses.replace(one, caption="") for one in found] == [
        dataclasses.replace(one, caption="") for one in SOME
    ]
    # JSON's null is what there is not.
    row = dict.fromkeys(FIELDS) | {
        name: getattr(SOME[0], name) for name in (*FIELDS[:3], "caption", "verdict")
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (verdict,) = read_verdicts(tmp_path / "a.jsonl", DATASET)
    assert (verdict.reviewer, verdict.score, verdict.sample) == ("", None, "")


def test_no_cell_of_the_csv_is_a_formula(tmp_path):
    path = tmp_path / "verdicts.csv"
    write_verdicts(path, SOME)
    assert path.read_bytes().startswith("\N{BYTE ORDER MARK}".encode())
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.reader(stream))
    assert tuple(rows[0]) == FIELDS
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))]
    for text in ("=1", "'=1", "''-2", "'tis", "", "'", "a=1", "\uff0dx"):
        assert cell_text(safe_cell(text)) == text


def test_the_last_verdict_of_a_reviewer_counts(tmp_path, caplog):
    path = tmp_path / "verdicts.jsonl"
    first = verdict(0, 1, "match", time="2026-11-22T00:30:00Z")
    later = verdict(0, 1, "no_match", time="2026-11-22T03:00:00+02:00")  # 01:00 UTC
    earlier = verdict(0, 1, "match", time="2026-11-22T02:00:00+02:00")  # 00:00 UTC
    other = verdict(0, 1, "match", reviewer="bob")
    write_verdicts(path, [first, later, other, earlier])
    assert read_verdicts(path) == [later, other]
    assert re.search(r"line 2: .* the latest counts; so have 2 rows in all", caplog.text)
    # Of equal times that which stands last.
    changed = dataclasses.replace(later, verdict="unsure")
    write_verdicts(path, [later, changed])
    assert read_verdicts(path) == [changed]


def test_the_majority_of_those_who_are_sure():
    names = "abcde"
    votes = [verdict(0, 1, word, reviewer=name) for word, name in zip(
        ("unsure", "no_match", "match", "match", "unsure"), names, strict=True)]  # fmt: skip
    split_vote = [verdict(1, 1, word, reviewer=word) for word in ("match", "no_match")]
    unsure = [verdict(2, 2, "unsure")]
    refuted = [verdict(3, 1, "no_match")]
    assert agreed(votes + split_vote + unsure + refuted) == [votes[2], *refuted]


def test_a_judge_answers_by_words_or_probabilities_where_nobody_else_does(tmp_path):
    told = {"reviewer": "llm", "instructions": "1a2b"}
    question = {"split": "train", "image_id": 10, "caption_id": 7, "caption": CAPTIONS[0]}
    answers = [{"verdict": word} for word in ("yes", "no", "unsure")]
    answers += [{"probability": chance} for chance in (0.51, 0.5, 0.49)]
    answers += [{"verdict": "no", "probability": 0.7}]
    rows = [question | told | answer | {"sample": str(n)} for n, answer in enumerate(answers)]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_verdicts(path, DATASET)
    words = ["match", "no_match", "unsure", "match", "unsure", "no_match", "no_match"]
    assert [one.verdict for one in found] == words and found[3].probability == 0.51
    # Of several by one judge the last counts, and none where a person has judged, even if unsure.
    assert opinions(found) == [found[-1]]
    for word in ("match", "unsure"):
        assert opinions([*found, verdict(0, 1, word)]) == [verdict(0, 1, word)]


def test_a_reviewer_has_one_opinion_whatever_asked(tmp_path):
    times = [f"2026-05-04T12:3{minute}:00+00:00" for minute in range(3)]
    said = [
        verdict(0, 1, "match", time=times[2], sample="first", weight=40.0),
        verdict(0, 1, "no_match", time=times[0], sample="second", weight=9.0),
        verdict(0, 1, "unsure", time=times[1]),
    ]
    path = tmp_path / "verdicts.csv"
    write_verdicts(path, [*said, said[1]])
    assert read_verdicts(path, DATASET) == [said[0], said[2], said[1]]
    for order in (said, said[::-1]):
        assert opinions(order) == agreed(order) == said[:1]


def test_verdicts_on_other_splits_alone_are_refused(tmp_path):
    path = tmp_path / "verdicts.csv"
    write_verdicts(path, SOME)  # the last is on val
    with pytest.raises(UserError, match="expected verdicts on the split test, got 3 on train and"):
        read_verdicts(path, DATASET, "test")
    write_verdicts(path, [])
    assert read_verdicts(path, DATASET, "test") == []
    with VerdictStore(tmp_path / "verdicts.sqlite") as store:
        store.import_verdicts(SOME[:1])
    with pytest.raises(UserError, match="the split test, got 1 on train"):
        read_any(tmp_path / "verdicts.sqlite", DATASET, "test")


def test_pairs_of_verdicts():
    assert pairs_of(SOME, DATASET).rows() == [(0, 1), (1, 2), (2, 0), (3, 0)]
    with pytest.raises(UserError, match="image_id 99 is not among the 3"):
        pairs_of([verdict(0, 1, image_id=99)], DATASET)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "sqlite"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": "another"}, r"caption 5 was 'another', and is 'a \"dog\",\\r\\nrunning' now"),
        ({"source_image_id": "+b"}, r"image 20 was '\+b', and is 'c' now"),
        ({"image_id": 31}, "image_id 31 is not among the 3 of the split"),
        ({"caption_id": 1}, "caption_id 1 is not among the 5 of the split"),
    ],
)
def test_verdicts_on_other_pairs_do_not_count(tmp_path, caplog, kind, changes, message):
    good = [verdict(0, 1, source_image_id=name) for name in ("", "../moved/+b")]
    changed = dataclasses.replace(verdict(1, 2), **changes)
    for number, given in enumerate(([good[0], changed], [good[1], changed], [changed])):
        path = tmp_path / f"verdicts{number}.{kind}"
        if kind == "sqlite":
            with VerdictStore(path) as store:
                store.import_verdicts(given)
        else:
            write_verdicts(path, given)
        if len(given) == 2:
            assert read_any(path, DATASET, "train") == given[:1]
            assert re.search(f"{path}: 1 of 2 verdicts are of other data .*{message}", caplog.text)
        else:
            with pytest.raises(UserError, match=f"{path}: none of its 1 .*{message}"):
                read_any(path, DATASET, "train")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, "split is 'dev'; expected one of train, val, test"),
        ({"verdict": "maybe"}, "verdict is 'maybe'; expected .*, unsure, yes, no"),
        ({"probability": 0.9}, "a judge's verdict takes its name as `reviewer` and a hash"),
        ({"instructions": "1a", "reviewer": ""}, "a judge's verdict takes its name"),
        ({"image_id": "1O"}, "image_id is '1O'; expected an integer"),
        ({"time": "22.11.2026"}, "time is '22.11.2026'; expected ISO 8601"),
        ({"time": "2026-11-22T00:30:00"}, "expected ISO 8601 with its offset"),
        ({"score": 1.5}, "score is '?1.5'?; expected 0 to 1"),
        ({"weight": 0.0}, "weight is '?0.0'?; expected 1 to"),
        ({"weight": "nan"}, "weight is 'nan'; expected 1 to"),
    ],
)
def test_a_damaged_row_is_told_by_its_line(tmp_path, kind, changes, message):
    path = tmp_path / f"verdicts.{kind}"
    write_verdicts(path, [verdict(0, 1), dataclasses.replace(verdict(1, 2), **changes)])
    line = 4 if kind == "csv" else 2  # the caption of the second row of a CSV has two lines
    with pytest.raises(UserError, match=message) as caught:
        read_verdicts(path, DATASET)
    assert str(caught.value).startswith(f"{path}: line {line}: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "expected a file of verdicts, .csv or .jsonl"),
        ("a.csv", b"", "the column 'split' is missing"),
        ("a.csv", b"split;image_id\n", "the column 'caption_id' is missing"),
        (
            "a.csv",
            b"split,image_id,caption_id,caption,verdict\ntrain,1\n",
            "line 2: caption_id, caption, verdict: not there",
        ),
        (
            "a.csv",
            b"split,image_id,caption_id,caption,verdict,time,time\n",
            "the column 'time' appears twice",
        ),
        ("a.csv", b'split,image_id,caption_id,caption,verdict\n"train,1', "line 2: not a CSV"),
        ("a.csv", b"split,\nb\xff", "line 2: not text in UTF-8"),
        ("a.jsonl", b"\n{", "line 2: not JSON"),
        ("a.jsonl", b"[1]", "line 1: expected an object"),
        ("a.jsonl", b"{}", "line 1: the key 'split' is missing"),
        ("a.jsonl", None, "cannot be read"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_verdicts(path)
    assert str(path) in str(caught.value)


def test_columns_beyond_a_verdicts_are_passed_over(tmp_path):
    row = {"note": "?", "verdict": "match", "caption": "x", "caption_id": 1, "image_id": 2}
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"split": "val"}))
    text = "note,verdict,caption,caption_id,image_id,split\n?,match,x,1,2,val\n,,,,,\n"
    (tmp_path / "a.csv").write_text(text)
    expected = [Verdict("val", 2, 1, "", "x", "match")]
    assert read_verdicts(tmp_path / "a.jsonl") == read_verdicts(tmp_path / "a.csv") == expected


def test_what_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match=r"expected a file of verdicts, .csv or .jsonl"):
        write_verdicts(tmp_path / "a.xlsx", SOME)
    with pytest.raises(UserError, match="cannot be written"):
        write_verdicts(tmp_path / "none" / "a.csv", SOME)
    assert verdicts_lib.WORDS == ("match", "no_match", "unsure")

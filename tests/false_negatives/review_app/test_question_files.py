"""Questions leave as a file and come back as verdicts, whoever answers them."""

import dataclasses
import json
import types

import pytest
from PIL import Image

from fne_jax import review
from fne_jax.errors import UserError
from fne_jax.false_negatives.review_app.questions import Questions
from fne_jax.false_negatives.verdict_store import VerdictStore, store_path
from tests.support.pages import hostile_split
from tests.support.reviews import some_questions

SPLIT = hostile_split()
JUDGE = {"reviewer": "llm", "instructions": "1a2b", "probability": 0.75}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function that runs `review` with arguments, on a made-up run; a list of questions.

    The list is that of a sample, whose fields may be changed.
    """
    asked = [
        dataclasses.replace(one, sample="drawn", weight=1.5 + number)
        for number, one in enumerate(some_questions(SPLIT))
    ]

    def suspects(*arguments):
        return {"about": "made up", "dataset": SPLIT, "questions": Questions(SPLIT, asked)}

    model = types.SimpleNamespace(load_split=lambda name: SPLIT)
    monkeypatch.setattr(review, "_suspects", suspects)
    monkeypatch.setattr(review, "stored_model", lambda workdir, overrides: model)
    return lambda *arguments: review.main([f"--workdir={tmp_path}", *arguments]), asked


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(path, rows, **changes):
    path.write_text("".join(json.dumps(row | JUDGE | changes) + "\n" for row in rows))


def test_a_judging_that_is_stopped_goes_on_where_it_was(run, tmp_path, capsys):
    (ask, asked), path, answers = run, tmp_path / "q" / "q.jsonl", tmp_path / "a.jsonl"
    arguments = ["--sample=14", "--reviewer=llm", f"--questions={path}"]
    ask(*arguments, f"--images-dir={tmp_path / 'images'}")
    rows = rows_of(path)
    assert [(row["caption_id"], row["image_id"]) for row in rows] == [
        (one.caption, one.image) for one in asked
    ]
    # Nothing tells how likely a match is.
    told = {"split", "image_id", "caption_id", "source_image_id", "caption", "sample", "image"}
    assert {name for row in rows for name in row} == told
    for row in rows:
        with Image.open(path.parent / row["image"]) as image:
            assert image.size == (9, 12)
    assert "14 questions written" in capsys.readouterr().out

    answer(answers, rows[:5])
    for added in (5, 0):
        ask(f"--import={answers}")
        assert f"{added} verdicts added" in capsys.readouterr().out
    with VerdictStore(store_path(tmp_path)) as store:
        verdicts = store.last()
    assert [one.weight for one in verdicts] == [one.weight for one in asked[:5]]
    assert {(one.verdict, one.probability, one.model, one.score) for one in verdicts} == {
        ("match", 0.75, "run step 3", 0.9)
    }
    ask(*arguments)
    assert rows_of(path) == [
        {name: row[name] for name in row if name != "image"} for row in rows[5:]
    ]
    assert "llm has answered 5 more" in capsys.readouterr().out
    # Who else is asked is asked everything.
    ask("--sample=14", "--reviewer=anna", f"--questions={path}")
    assert len(rows_of(path)) == 14


def test_suspects_come_in_no_order(run, tmp_path):
    ask, asked = run
    asked[:] = [dataclasses.replace(one, sample="", weight=None) for one in asked]
    ask(f"--questions={tmp_path / 'q.jsonl'}")
    pairs = [(row["caption_id"], row["image_id"]) for row in rows_of(tmp_path / "q.jsonl")]
    ranked = [(one.caption, one.image) for one in asked]
    assert sorted(pairs) == sorted(ranked) and pairs != ranked


def test_answers_to_other_questions_are_told(run, tmp_path, caplog, capsys):
    (ask, _), path, answers = run, tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    ask("--sample=14", f"--questions={path}")
    rows = rows_of(path)
    answer(answers, [rows[0] | {"caption": "another"}, rows[1] | {"image_id": 99}, rows[2]])
    ask(f"--import={answers}")
    assert "2 of 3 verdicts are of other data and do not count: caption 0 was" in caplog.text
    assert "1 verdicts added" in capsys.readouterr().out
    # Their weights would be lost.
    answer(answers, rows[3:5], sample="another")
    with pytest.raises(UserError, match=r"2 of 2 answers are on pairs that no sample of .*"):
        ask(f"--import={answers}")
    with pytest.raises(UserError, match="2 of 2 answers"):
        ask(f"--import={answers}", f"--store={tmp_path / 'new.sqlite'}")
    assert not (tmp_path / "new.sqlite").exists()

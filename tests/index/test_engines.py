"""Indexes of faiss against the exact engine: what they find, keep, and cannot do."""

import json
import logging
import sys
import types

import numpy as np
import pytest

from fne_jax.errors import UserError
from fne_jax.index import engines, exact
from fne_jax.index.kept_rows import KeptRows
from fne_jax.index.names import Names
from fne_jax.index.search_index import _recall_of_own, recall_at
from tests.support.index import Model, build, unit, write_image

DIM = 8


@pytest.fixture
def part(tmp_path):
    return part_of(tmp_path / "index", range(90))


def part_of(folder, numbers, dim=DIM):
    folder.mkdir(exist_ok=True)
    rows = unit(np.random.default_rng(0).standard_normal((200, dim)))[list(numbers)]
    names, stamps = Names.of(map(str, numbers)), np.zeros((len(rows), 2), np.int64)
    kept = KeptRows(folder, {"step": 1})
    kept.add(names, stamps, rows)
    return kept.complete(names, stamps)


@pytest.fixture
def queries():
    return unit(np.random.default_rng(1).standard_normal((7, DIM)))


@pytest.mark.parametrize("spec", ["faiss:Flat", "faiss:IVF4,Flat@nprobe=4"])
def test_an_engine_that_compares_all_finds_what_the_exact_one_does(part, queries, spec):
    engine = engines.create_engine(spec, part)
    np.testing.assert_array_equal(
        engine(queries, 5), exact.nearest(part.open_rows(), queries, 5)[0]
    )
    assert recall_at(engine, part.open_rows(), queries) == 1
    assert _recall_of_own(engine, part.open_rows()) == 1


def test_recall_is_the_share_of_the_exact_first_ten(part, queries):
    rows = part.open_rows()

    def each_second(queries, count):
        return exact.nearest(rows, queries, len(rows))[0][:, ::2][:, :count]

    whole, found = exact.nearest(rows, queries, 10)[0], each_second(queries, 10)
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(whole, found, strict=True)]
    assert recall_at(each_second, rows, queries) == pytest.approx(np.mean(shares)) == 0.5
    # Of the first eleven the query itself is left out: ten remain, of which five are found.
    assert _recall_of_own(each_second, rows) == pytest.approx(0.5)


def test_rows_as_near_as_the_last_count_for_recall():
    rows = np.tile(unit(np.ones((1, DIM))), (30, 1)).astype(np.float16)

    def last(queries, count):
        return np.tile(np.arange(30 - count, 30), (len(queries), 1))

    assert recall_at(last, rows, rows[:2].astype(np.float32)) == 1
    assert _recall_of_own(last, rows) == 1


def test_a_faiss_index_is_made_once_for_the_same_rows(part, queries, monkeypatch, caplog):
    first = engines.create_engine("faiss:HNSW8", part)(queries, 5)
    (path,) = part.folder.glob("faiss-*.index")
    made = []
    monkeypatch.setattr(engines, "_build_index", lambda *arguments: made.append(1))
    again = engines.create_engine("faiss:HNSW8", part)(queries, 5)
    np.testing.assert_array_equal(again, first)
    assert not made
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, logger="fne_jax"):
        again = engines.create_engine("faiss:HNSW8", part)(queries, 5)
    np.testing.assert_array_equal(again, first)
    assert "is damaged; it is built again" in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("faiss:Nonsense", "faiss:Nonsense: faiss cannot make it: could not parse"),
        ("faiss:IVF1000,Flat", r"1000,Flat: faiss cannot make it: Number of training points \(90"),
        ("faiss:IVF4,Flat@nonsense=3", "could not set parameter nonsense"),
        ("faiss:IVF4,Flat@nprobe=0", "nprobe=0: faiss cannot make it: .*nprobe > 0"),
        ("faiss:IVF0,Flat", "IVF0,Flat: faiss cannot make it: .*nprobe > 0"),
    ],
)
def test_what_faiss_refuses_is_one_line(part, spec, message):
    with pytest.raises(UserError, match=message) as error:
        engines.create_engine(spec, part)
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    assert "@" in spec or not list(part.folder.glob("faiss-*"))


@pytest.mark.parametrize("spec", ["", "fais:Flat", "faiss", "faiss:", "exact:2"])
def test_what_is_no_engine_is_refused_before_anything_is_embedded(spec, tmp_path):
    write_image(tmp_path / "photos" / "a.png", 1)
    model = Model()
    with pytest.raises(UserError, match="expected exact or faiss:FACTORY"):
        build(tmp_path / "photos", tmp_path / "index", model, engine=spec)
    assert not model.embedded and not (tmp_path / "index").exists()


def test_an_extra_that_is_missing_is_named(part, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        UserError, match=r"--index=faiss:x needs faiss: pip install -e '\.\[faiss\]'"
    ):
        engines.create_engine("faiss:x", part)


def test_recall_across_images_and_texts_is_told_apart_and_kept(tmp_path):
    for number in range(12):
        write_image(tmp_path / "photos" / f"{number:02d}.png", number)
    model, asked = Model(), []

    def load_split(name):
        asked.append(name)
        return types.SimpleNamespace(captions=["a dog", "a cat"])

    def no_split(name):
        raise UserError("there is no such dataset any more")

    def indexed(load_split):
        model.load_split = load_split
        return build(tmp_path / "photos", tmp_path / "index", model, engine="faiss:Flat")

    for _ in range(2):
        index = indexed(load_split)
        assert index.recall == {"text_to_image": 1, "image_to_image": 1} and asked == ["val"]
    (path,) = (tmp_path / "index").glob("part-*/recall-*.json")
    assert json.loads(path.read_text()) == index.recall
    for damaged in ("[1]", '{"text_to_image": null}'):
        path.write_text(damaged)
        assert indexed(load_split).recall == index.recall
    path.unlink()
    assert indexed(no_split).recall == {"image_to_image": 1}
    assert build(tmp_path / "photos", tmp_path / "index").recall == {}


def test_scores_are_cosines_whatever_finds_them(tmp_path):
    for number in range(40):
        write_image(tmp_path / "photos" / f"{number:02d}.png", number)
    model = Model()
    model.load_split = lambda name: types.SimpleNamespace(captions=["a dog"])
    exactly = build(tmp_path / "photos", None, model).search("a dog", top=3)
    quantised = build(tmp_path / "photos", None, model, engine="faiss:SQ4").search("a dog", top=40)
    assert [hit.score for hit in quantised] == sorted((h.score for h in quantised), reverse=True)
    assert quantised[:3] == [
        type(hit)(hit.rank, hit.score, hit.name, hit.path, hit.captions) for hit in exactly
    ]

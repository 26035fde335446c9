"""Engines of faiss and Qdrant against the exact one: what they find, keep, and cannot do."""

import gc
import json
import logging
import shutil
import sqlite3
import sys
import types

import numpy as np
import pytest

from fne_jax.errors import UserError
from fne_jax.index import engines, exact
from fne_jax.index.kept_rows import KeptRows
from fne_jax.index.search_index import _recall_of_own, recall_at
from tests.support.index import Model, build, unit, write_image

DIM = 8


@pytest.fixture
def part(tmp_path):
    return part_of(tmp_path / "index", range(90))


def part_of(folder, numbers, dim=DIM):
    folder.mkdir(exist_ok=True)
    rows = unit(np.random.default_rng(0).standard_normal((200, dim)))[list(numbers)]
    names, stamps = [str(number) for number in numbers], [[0]] * len(rows)
    kept = KeptRows(folder, {"step": 1})
    kept.add(names, stamps, rows)
    return kept.complete(names, stamps)


@pytest.fixture
def queries():
    return unit(np.random.default_rng(1).standard_normal((7, DIM)))


@pytest.mark.parametrize("spec", ["faiss:Flat", "faiss:IVF4,Flat@nprobe=4", "qdrant::memory:"])
def test_an_engine_that_compares_all_finds_what_the_exact_one_does(part, queries, spec):
    engine = engines.create_engine(spec, part)
    np.testing.assert_array_equal(
        engine.nearest(queries, 5), exact.nearest(part.open_rows(), queries, 5)[0]
    )
    assert recall_at(engine, part.open_rows(), queries) == 1
    assert _recall_of_own(engine, part.open_rows()) == 1


def test_recall_is_the_share_of_the_exact_first_ten(part, queries):
    class Half(engines.Exact):
        """Finds each second row alone, and so a half on average."""

        def nearest(self, queries, count):
            return super().nearest(queries, len(part.open_rows()))[:, ::2][:, :count]

    engine, whole = Half(part), exact.nearest(part.open_rows(), queries, 10)[0]
    found = engine.nearest(queries, 10)
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(whole, found, strict=True)]
    assert recall_at(engine, part.open_rows(), queries) == pytest.approx(np.mean(shares)) == 0.5
    # Of the first eleven the query itself is left out: ten remain, of which five are found.
    assert _recall_of_own(engine, part.open_rows()) == pytest.approx(0.5)


def test_rows_as_near_as_the_last_count_for_recall(tmp_path):
    folder = tmp_path / "equal"
    folder.mkdir()
    rows, names = np.tile(unit(np.ones((1, DIM))), (30, 1)), [str(number) for number in range(30)]
    kept = KeptRows(folder, {})
    kept.add(names, [[]] * 30, rows)
    part = kept.complete(names, [[]] * 30)

    class Last(engines.Exact):
        def nearest(self, queries, count):
            return np.tile(np.arange(30 - count, 30), (len(queries), 1))

    assert recall_at(Last(part), part.open_rows(), rows[:2]) == 1
    assert _recall_of_own(Last(part), part.open_rows()) == 1


def test_a_faiss_index_is_made_once_for_the_same_rows(part, queries, monkeypatch, caplog):
    first = engines.create_engine("faiss:HNSW8", part).nearest(queries, 5)
    (path,) = part.folder.glob("faiss-*.index")
    made = []
    monkeypatch.setattr(engines.Faiss, "_built", lambda *arguments: made.append(1), raising=True)
    again = engines.create_engine("faiss:HNSW8", part).nearest(queries, 5)
    np.testing.assert_array_equal(again, first)
    assert not made
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, logger="fne_jax"):
        again = engines.create_engine("faiss:HNSW8", part).nearest(queries, 5)
    np.testing.assert_array_equal(again, first)
    assert "is damaged; it is made anew" in caplog.text


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


@pytest.mark.parametrize("spec", ["", "fais:Flat", "faiss", "faiss:", "qdrant:", "exact:2"])
def test_what_is_no_engine_is_refused_before_anything_is_embedded(spec, tmp_path):
    write_image(tmp_path / "photos" / "a.png", 1)
    model = Model()
    with pytest.raises(UserError, match="expected exact, faiss:FACTORY"):
        build(tmp_path / "photos", tmp_path / "index", model, engine=spec)
    assert not model.embedded and not (tmp_path / "index").exists()


def test_an_extra_that_is_missing_is_named(part, monkeypatch):
    for module, extra in (("faiss", "faiss"), ("qdrant_client", "qdrant")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"pip install -e '?\.\[{extra}\]"):
            engines.create_engine(f"{extra}:x", part)


# Qdrant's local mode leaves the database of a collection that it deletes to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_collection_follows_the_rows(tmp_path, queries, monkeypatch):
    spec, sent = f"qdrant:{tmp_path / 'qdrant'}", []
    for numbers in (range(20), range(5, 30), range(5, 30)):
        part = part_of(tmp_path / "index", numbers)
        engine = engines.create_engine(spec, part)
        np.testing.assert_array_equal(
            engine.nearest(queries, 25)[:, : len(numbers)],
            exact.nearest(part.open_rows(), queries, 25)[0],
        )
        sent.append(engine.sent)
        del engine  # which frees the folder
    assert sent == [20, 10, 0]
    # The folder may be of another model by now, whose embeddings are longer.
    shutil.rmtree(tmp_path / "index")
    part = part_of(tmp_path / "index", range(9), dim=DIM + 2)
    assert engines.create_engine(spec, part).sent == 9
    gc.collect()


def test_no_database_is_left_open(tmp_path):
    gc.collect()
    spec, part = f"qdrant:{tmp_path / 'qdrant'}", part_of(tmp_path / "index", range(7))
    before = open_databases()
    engine = engines.create_engine(spec, part)
    assert len(open_databases() - before) == 1
    del engine
    assert open_databases() == before


def open_databases():
    """Returns the ids of the SQLite connections of this process that nobody has closed."""
    # `isinstance` would ask objects that stand for others what they are.
    connections = [thing for thing in gc.get_objects() if type(thing) is sqlite3.Connection]
    return {id(one) for one in connections if is_open(one)}


def is_open(connection):
    try:
        connection.total_changes  # noqa: B018
    except sqlite3.ProgrammingError:
        return False
    return True


def test_a_folder_is_free_when_its_engine_is_no_longer_used(tmp_path):
    spec, part = f"qdrant:{tmp_path / 'qdrant'}", part_of(tmp_path / "index", range(7))
    first = engines.create_engine(spec, part)
    kept = first._client  # as a cycle or a traceback would
    del first
    assert engines.create_engine(spec, part).sent == 0
    del kept


def test_a_server_that_is_not_there_is_one_line(part):
    with pytest.raises(UserError, match="Qdrant cannot be used") as error:
        engines.create_engine("qdrant:http://127.0.0.1:9", part)
    assert "\n" not in str(error.value) and error.value.exit_code == 74


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
    path.unlink()
    assert indexed(no_split).recall == {"image_to_image": 1}
    assert build(tmp_path / "photos", tmp_path / "index").recall == {}


def test_scores_are_cosines_whatever_finds_them(tmp_path):
    for number in range(40):
        write_image(tmp_path / "photos" / f"{number:02d}.png", number)
    exactly = build(tmp_path / "photos", None).search("a dog", top=3)
    quantised = build(tmp_path / "photos", None, engine="faiss:SQ4").search("a dog", top=40)
    assert [hit.score for hit in quantised] == sorted((h.score for h in quantised), reverse=True)
    assert quantised[:3] == [
        type(hit)(hit.rank, hit.score, hit.name, hit.path, hit.captions) for hit in exactly
    ]

"""A store keeps every verdict that it said it has, whoever writes beside it."""

import dataclasses
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from fne_jax.data.verdicts import Verdict, read_verdicts, write_verdicts
from fne_jax.errors import UserError
from fne_jax.false_negatives.verdict_store import VerdictStore, store_path
from tests.support import TOP

FIRST = Verdict("train", 7, 70, "a/7.jpg", "a dog", "match", "anna", "2026-05-04T12:30:00+00:00",
                "run step 3", 0.25, "", None)  # fmt: skip


def other(**changed):
    return dataclasses.replace(FIRST, **changed)


def test_what_was_added_is_there_when_it_is_opened_again(tmp_path):
    path = store_path(tmp_path)
    drawn = other(caption_id=71, caption="=1+1 'é\n", sample="even", weight=3.5, score=None)
    with VerdictStore(path) as store:
        store.add(FIRST)
        store.add(drawn)
    with VerdictStore(path, read_only=True) as store:
        assert store.last() == [FIRST, drawn]
        assert store.last("val") == []


def test_the_last_of_a_reviewer_counts_and_can_be_taken_back(tmp_path):
    with VerdictStore(tmp_path / "v.sqlite") as store:
        second, berts = other(verdict="no_match"), other(reviewer="bert", verdict="unsure")
        for verdict in (FIRST, berts, second):
            store.add(verdict)
        assert store.last("train") == [berts, second]
        assert store.take_back("anna", "val") is None
        assert store.take_back("anna", "train") == second
        assert store.last() == [FIRST, berts]
        assert store.take_back("anna", "train") == FIRST
        assert store.take_back("anna", "train") is None
        assert store.last() == [berts]


def test_a_store_hears_of_what_others_write_or_take_back(tmp_path):
    with VerdictStore(tmp_path / "v.sqlite") as store, VerdictStore(store.path) as berts:
        assert store.changed() and not store.changed()  # at first all is new
        store.add(FIRST)
        assert not store.changed()
        for write in (lambda: berts.add(other()), lambda: berts.take_back("anna", "train")):
            write()
            assert store.changed() and not store.changed()


def test_importing_adds_what_is_new_and_never_what_is_older(tmp_path):
    later = "2026-05-04T12:31:00Z"  # the same moment may be written in several ways
    with VerdictStore(tmp_path / "v.sqlite") as store:
        store.add(FIRST)
        older = other(verdict="no_match", time="2026-05-04T13:00:00+02:00")
        undated, again = other(verdict="unsure", time=""), other(time=later)
        foreign = other(reviewer="bert", time="")
        assert [store.import_verdicts([one]) for one in (older, undated, again)] == [0, 0, 0]
        assert store.import_verdicts([other(verdict="no_match", time=later), foreign]) == 2
        assert store.import_verdicts([other(verdict="no_match", time=later), foreign]) == 0
        assert [one.verdict for one in store.last()] == ["no_match", "match"]
        # A judge that is surer than before says something else.
        judged = [other(reviewer="llm", instructions="1a", probability=p) for p in (0.7, 0.8)]
        assert [store.import_verdicts([one]) for one in (*judged, judged[1])] == [1, 1, 0]
        assert store.last()[-1] == judged[1]
        # What was imported is not what somebody has just answered by mistake.
        assert store.take_back("bert", "train") is None
        assert store.take_back("anna", "train") == FIRST


@pytest.mark.parametrize("time", [FIRST.time, ""])
def test_importing_takes_a_corrected_verdict(tmp_path, time):
    with VerdictStore(tmp_path / "v.sqlite") as store:
        store.add(other(time=time, sample="even", weight=3.5))
        exported = tmp_path / "v.csv"
        write_verdicts(exported, store.last())
        assert store.import_verdicts(read_verdicts(exported)) == 0
        exported.write_text(exported.read_text().replace(",match,", ",no_match,"))
        assert store.import_verdicts(read_verdicts(exported)) == 1
        assert store.import_verdicts(read_verdicts(exported)) == 0
        corrected = other(verdict="no_match", time=time, sample="even", weight=3.5)
        assert store.last() == [corrected]


def test_half_a_character_is_no_reason_to_lose_a_verdict(tmp_path):
    with VerdictStore(tmp_path / "v.sqlite") as store:
        store.add(other(caption="a dog \ud800"))
        assert store.last()[0].caption == "a dog ?"


def test_several_threads_and_stores_write_at_once(tmp_path):
    stores = [VerdictStore(tmp_path / "v.sqlite") for _ in range(2)]

    def write(store, thread):
        for number in range(20):
            store.add(other(caption_id=100 * thread + number))

    threads = [threading.Thread(target=write, args=(stores[n % 2], n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores[0].last()) == len(stores[1].last()) == 80
    for store in stores:
        store.close()


# Adds verdicts until it is killed, and tells of each when `add` has returned.
WRITER = """
import pathlib, sys
from fne_jax.false_negatives.verdict_store import VerdictStore
from fne_jax.data.verdicts import Verdict
with VerdictStore(pathlib.Path(sys.argv[1])) as store:
    for number in range(10**9):
        store.add(Verdict("train", 7, number, "a/7.jpg", "a dog", "match", "anna"))
        print(number, flush=True)
"""


def test_a_killed_writer_loses_nothing(tmp_path):
    path = tmp_path / "v.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, path], cwd=TOP, stdout=subprocess.PIPE, text=True
    ) as writer:
        told = [int(writer.stdout.readline()) for _ in range(30)]
        writer.send_signal(signal.SIGKILL)
        told += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    with VerdictStore(path) as store:
        kept = [one.caption_id for one in store.last()]
    assert kept[: len(told)] == told and len(kept) <= len(told) + 1


def test_a_copy_of_the_file_alone_holds_all_that_was_told(tmp_path):
    with VerdictStore(tmp_path / "v.sqlite") as store:
        for number in range(30):
            store.add(other(caption_id=number))
            copy = shutil.copy(store.path, tmp_path / "copy.sqlite")
            with VerdictStore(tmp_path / copy, read_only=True) as copied:
                assert len(copied.last()) == number + 1


def test_half_a_write_is_undone_by_whoever_opens_the_file_next(tmp_path):
    with VerdictStore(tmp_path / "v.sqlite") as store:
        for number in range(30):
            store.add(other(caption_id=number))
        before = store.last()
        for sql in (
            "PRAGMA cache_size = 1",
            "BEGIN",
            "UPDATE verdicts SET caption = hex(zeroblob(999))",
        ):
            store._connection.execute(sql)
        for name in ("v.sqlite", "v.sqlite-journal"):  # as a kill would leave them
            shutil.copy(tmp_path / name, tmp_path / f"killed-{name}")
        store._connection.execute("ROLLBACK")
    with VerdictStore(tmp_path / "killed-v.sqlite", read_only=True) as reader:
        assert reader.last() == before


def test_every_write_waits_for_the_disk(tmp_path):
    # A power cut cannot be tried here; SQLite documents what this setting means for one.
    with VerdictStore(tmp_path / "v.sqlite") as store:
        assert store._connection.execute("PRAGMA synchronous").fetchone() == (3,)
        assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_reader_writes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a run? 100%" / "v.sqlite"
    with VerdictStore(path) as store:
        store.add(FIRST)
        with VerdictStore(path, read_only=True) as reader:  # beside a server that is running
            assert reader.last() == [FIRST]
    before = path.read_bytes(), path.stat().st_mtime_ns
    path.chmod(0o444)
    path.parent.chmod(0o555)
    with VerdictStore(path, read_only=True) as reader:
        assert reader.last() == [FIRST] and os.listdir(path.parent) == ["v.sqlite"]
        for use in (
            lambda: reader.add(FIRST),
            lambda: reader.import_verdicts([other(caption_id=9)]),
        ):
            with pytest.raises(UserError, match=r"v\.sqlite: attempt to write a readonly database"):
                use()
    monkeypatch.setattr(os, "access", lambda where, mode: where != path)  # root may do all
    with pytest.raises(UserError, match=r"v\.sqlite: you may not write to it"):
        VerdictStore(path)
    path.parent.chmod(0o755)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("replaced", [False, True])
def test_a_store_that_was_deleted_takes_no_verdict(tmp_path, replaced):
    path, away = tmp_path / "v.sqlite", tmp_path / "away.sqlite"
    with VerdictStore(path) as store:
        store.add(FIRST)
        path.rename(away)
        if replaced:
            VerdictStore(path).close()
        for use in (
            lambda: store.add(other(verdict="no_match")),
            lambda: store.take_back("anna", "train"),
            lambda: store.import_verdicts([other(reviewer="bert")]),
            store.last,
        ):
            with pytest.raises(UserError, match=r"v\.sqlite is no longer the file that was opened"):
                use()
        if not replaced:
            away.rename(path)
            assert store.last() == [FIRST]


def garbled(path):
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: path.write_bytes(b"no database, but long enough to be read" * 9), "damaged"),
        (garbled, "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
    ],
)
def test_a_damaged_store_is_named(tmp_path, break_it, message):
    path = tmp_path / "v.sqlite"
    with VerdictStore(path) as store:
        store.import_verdicts(other(caption_id=number) for number in range(200))
    break_it(path)
    for read_only in (True, False):
        with pytest.raises(UserError, match=f"v.sqlite.*{message}") as error:
            VerdictStore(path, read_only=read_only)
        assert "\n" not in str(error.value)


def test_other_databases_are_left_alone(tmp_path):
    path = tmp_path / "theirs.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE verdicts (x)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"theirs\.sqlite is an SQLite file, but not of verdicts"):
        VerdictStore(path)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"nothing\.sqlite does not exist"):
        VerdictStore(tmp_path / "nothing.sqlite", read_only=True)
    assert not (tmp_path / "nothing.sqlite").exists()
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    with pytest.raises(UserError, match=r"empty\.sqlite is empty; expected a store"):
        VerdictStore(empty, read_only=True)
    assert not empty.read_bytes()
    newer = tmp_path / "newer.sqlite"
    VerdictStore(newer).close()
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(UserError, match="version 3, this code's of 2"):
        VerdictStore(newer)

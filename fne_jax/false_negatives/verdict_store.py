"""The verdicts on a run's pairs as they are given, in SQLite: each is on the disk when it is told.

Rows are only ever added, but for those that their reviewer takes back: of several verdicts of a
reviewer on a pair the last of each sample is kept, and taking it back lets the one before count
again. Several
processes may read and write one store at a time. Between two of their writes a copy of the file
holds all that was told: there is no second file that it needs, as a write-ahead log would be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

from fne_jax.data.pairs import PairDataset
from fne_jax.data.verdicts import (
    FIELDS,
    Verdict,
    moment,
    on_pairs_of,
    read_verdicts,
    refuse_other_splits,
)
from fne_jax.errors import UserError
from fne_jax.files import as_user_error

# Stands in the head of the file ("FNEv" in ASCII), and the version of its tables.
_APPLICATION, _VERSION = 0x464E4576, 2
# Seconds to wait for another process that writes.
_PATIENCE = 10.0

_TABLES = """
CREATE TABLE IF NOT EXISTS verdicts (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  split TEXT NOT NULL,
  image_id INTEGER NOT NULL,
  caption_id INTEGER NOT NULL,
  source_image_id TEXT NOT NULL,
  caption TEXT NOT NULL,
  verdict TEXT NOT NULL CHECK (verdict IN ('match', 'no_match', 'unsure')),
  reviewer TEXT NOT NULL,
  time TEXT NOT NULL,
  model TEXT NOT NULL,
  score REAL,
  sample TEXT NOT NULL,
  weight REAL,
  probability REAL,
  instructions TEXT NOT NULL,
  imported INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS questions (
  split TEXT NOT NULL,
  image_id INTEGER NOT NULL,
  caption_id INTEGER NOT NULL,
  sample TEXT NOT NULL,
  model TEXT NOT NULL,
  score REAL,
  weight REAL,
  PRIMARY KEY (split, image_id, caption_id, sample)
);
CREATE INDEX IF NOT EXISTS pairs ON verdicts (split, caption_id, image_id, reviewer, sample);
"""
_COLUMNS = ", ".join(FIELDS)
_INSERT = f"INSERT INTO verdicts ({_COLUMNS}, imported) VALUES ({', '.join('?' * len(FIELDS))}, ?)"
# Of a question: its pair and sample, and what whoever answers it is not told.
_ASKED = ("split", "image_id", "caption_id", "sample", "model", "score", "weight")
_LAST_NUMBERS = (
    "(SELECT max(number) FROM verdicts GROUP BY split, caption_id, image_id, reviewer, sample)"
)
_LAST = f"SELECT {_COLUMNS} FROM verdicts WHERE number IN {_LAST_NUMBERS} "


def store_path(workdir: pathlib.Path) -> pathlib.Path:
    """Returns where a run's verdicts are."""
    return workdir / "reviews" / "verdicts.sqlite"


def read_any(path: pathlib.Path, dataset: PairDataset, split: str) -> list[Verdict]:
    """Returns each reviewer's last verdict on each pair of a split in each sample it is of.

    The file is a store, `.sqlite`, or a `.csv` or `.jsonl` as `write_verdicts` writes it; verdicts
    on other pairs are set aside with a warning. Raises UserError if it cannot be read, or none of
    its verdicts is on the split, or on a pair of the dataset.
    """
    if path.suffix != ".sqlite":
        return read_verdicts(path, dataset, split)
    with VerdictStore(path, read_only=True) as store:
        stored = store.last()
    verdicts = [verdict for verdict in stored if verdict.split == split]
    if not verdicts:
        refuse_other_splits(path, split, Counter(verdict.split for verdict in stored))
    return on_pairs_of(dataset, verdicts, path, refuse=True)


class VerdictStore:
    """The verdicts of a file, which is made with its folder if it does not exist.

    One object may be used by several threads.

    With `read_only` nothing is written, neither the file nor beside it, but to undo what a program
    that was killed has left half written. Raises UserError if the file is damaged, is not a store
    of verdicts, or cannot be opened or made; later too, if it was deleted, moved or replaced since
    it was opened.
    """

    def __init__(self, path: pathlib.Path, *, read_only: bool = False):
        self.path = path
        self._lock = threading.Lock()
        # SQLite's number of what other connections have written, as `changed` saw it last.
        self._version = 0
        # What the file is by its device and number, once it is open.
        self._opened: os.stat_result | None = None
        # Of a path's ancestors that may not be read, pathlib's own tests would raise.
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder; expected an SQLite file of verdicts")
        if read_only and not os.path.isfile(path):
            raise UserError(f"{path} does not exist; `review` makes it")
        if not read_only:
            with as_user_error(f"{path.parent}: cannot be created"):
                path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite would tell it with the first verdict.
            if os.path.exists(path) and not all(
                os.access(one, os.W_OK) for one in (path, path.parent)
            ):
                raise UserError(f"{path}: you may not write to it, or not to its folder, as "
                                "SQLite has to; name another --store")  # fmt: skip
        # Not `immutable`, by which a reader would take no lock and might see half of a write.
        # What is half written cannot be read, and only who may write can undo it by its journal.
        only = read_only and not os.path.exists(f"{path}-journal")
        address = path.absolute().as_uri() + ("?mode=ro" if only else "")
        with self._told():
            self._connection = sqlite3.connect(
                address, _PATIENCE, uri=True, isolation_level=None, check_same_thread=False
            )
        try:
            with self._told():
                self._prepare(read_only)
                self._opened = _stat(path)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Closes the file; every verdict is in it already."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> VerdictStore:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def add(self, verdict: Verdict) -> None:
        """Adds a verdict, which is on the disk when this returns.

        Raises UserError if it cannot be written.
        """
        with self._told():
            self._connection.execute(_INSERT, _row(verdict, imported=False))

    def take_back(self, reviewer: str, split: str) -> Verdict | None:
        """Removes a reviewer's newest verdict on a split that was not imported, and returns it.

        Returns:
          What was removed; None if there was nothing.

        Raises UserError if it cannot be written.
        """
        with self._told():
            # One statement, so that of two processes each takes back another.
            row = self._connection.execute(
                "DELETE FROM verdicts WHERE number = (SELECT number FROM verdicts WHERE reviewer = "
                "? AND split = ? AND NOT imported ORDER BY number DESC LIMIT 1) "
                f"RETURNING {_COLUMNS}",
                (reviewer, split),
            ).fetchall()
        return Verdict(*row[0]) if row else None

    def last(self, split: str | None = None) -> list[Verdict]:
        """Returns each reviewer's last verdict on each pair in each sample, the oldest first.

        They are of a split, or of all. Raises UserError if the file cannot be read.
        """
        where, values = ("", ()) if split is None else ("AND split = ? ", (split,))
        with self._told():
            rows = self._connection.execute(f"{_LAST}{where}ORDER BY number", values).fetchall()
        return [Verdict(*row) for row in rows]

    def changed(self) -> bool:
        """Returns whether another store has written to the file since this was asked last.

        Raises UserError if the file cannot be read.
        """
        before = self._version
        with self._told():
            self._version = self._connection.execute("PRAGMA data_version").fetchone()[0]
        return self._version != before

    def import_verdicts(self, verdicts: Iterable[Verdict]) -> int:
        """Adds verdicts that the store does not have, all or none; returns how many these were.

        A verdict older than what its reviewer has said in that sample since is left out. Of two of
        the same time that differ the imported one counts, for somebody has corrected it.

        There is at most one of each reviewer on each pair in each sample. Raises UserError if they
        cannot be written.
        """
        with self._writing():
            there = {
                _key(one): one
                for one in itertools.starmap(Verdict, self._connection.execute(_LAST))
            }
            new = [
                one
                for one in verdicts
                if _key(one) not in there or _supersedes(one, there[_key(one)])
            ]
            rows = [_row(verdict, imported=True) for verdict in new]
            self._connection.executemany(_INSERT, rows)
        return len(new)

    def keep_asked(self, questions: Iterable[Verdict]) -> None:
        """Keeps what a question does not tell whoever answers it, for `as_asked`.

        Raises UserError if they cannot be written.
        """
        rows = [[getattr(one, name) for name in _ASKED] for one in questions]
        into = f"INSERT OR REPLACE INTO questions VALUES ({', '.join('?' * len(_ASKED))})"
        with self._writing():
            self._connection.executemany(into, rows)

    def as_asked(self, verdicts: Iterable[Verdict]) -> list[Verdict]:
        """Returns verdicts with the model, the score and the weight of the questions they answer.

        Those with a model or a weight, and those that answer no question that was kept, stay as
        they are.

        Raises UserError if the file cannot be read.
        """
        with self._told():
            rows = self._connection.execute("SELECT * FROM questions").fetchall()
        asked = {row[:4]: dict(zip(_ASKED[4:], row[4:], strict=True)) for row in rows}
        return [
            one
            if one.model or one.weight is not None
            else dataclasses.replace(one, **asked.get((*one.pair, one.sample), {}))
            for one in verdicts
        ]

    def _prepare(self, read_only):
        connection = self._connection
        # The tables first: another process may make them at this moment, with the rest.
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        ours = connection.execute("PRAGMA application_id").fetchone()[0]
        if not tables and read_only:
            raise UserError(f"{self.path} is empty; expected a store that `review` has made")
        if tables and ours != _APPLICATION:
            raise UserError(f"{self.path} is an SQLite file, but not of verdicts; name another")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if tables and version != _VERSION:
            raise UserError(
                f"{self.path}: its tables are of version {version}, this code's of {_VERSION}; "
                "use the version of the code that wrote it, and export its verdicts"
            )
        damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise sqlite3.DatabaseError(damage)
        if not read_only:
            connection.execute("PRAGMA journal_mode = DELETE")
        # A verdict is told once the file has it, and the journal that would undo it is gone.
        connection.execute("PRAGMA synchronous = EXTRA")
        if not tables:
            connection.executescript(
                f"BEGIN IMMEDIATE; {_TABLES} PRAGMA application_id = {_APPLICATION}; "
                f"PRAGMA user_version = {_VERSION}; COMMIT"
            )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Lets one thread at a time use the connection; turns SQLite's errors into UserErrors."""
        try:
            with self._lock:
                self._check_that_it_is_there()
                yield
        except sqlite3.OperationalError as error:
            raise UserError(f"{self.path}: {error}; is it on a disk of this machine that has room, "
                            "and may you write there?") from error  # fmt: skip
        except sqlite3.DatabaseError as error:
            told = " ".join(str(error).split())  # SQLite tells of some damage in several lines
            raise UserError(
                f"{self.path} is damaged: {told}. Move it away; SQLite's own `.recover` may get "
                "verdicts out of it, and an exported file of them can be imported again"
            ) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Does all of the block's writes, or none."""
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

    def _check_that_it_is_there(self):
        """Raises UserError if what is written would be in no file, or in none that has the path."""
        if self._opened is None:
            return
        now = _stat(self.path)
        if now is None or not os.path.samestat(now, self._opened):
            raise UserError(
                f"{self.path} is no longer the file that was opened: it was deleted, moved or "
                "replaced; move it back, or end this program and start it again"
            )


def _stat(path):
    """Returns what the file system tells of a file, or None."""
    try:
        return path.stat()
    except OSError:
        return None


def _row(verdict, imported):
    # Captions may hold half of a surrogate pair, which no encoding can.
    texts = (
        value.encode(errors="replace").decode() if isinstance(value, str) else value
        for value in dataclasses.astuple(verdict)
    )
    return (*texts, imported)


def _key(verdict):
    return *verdict.pair, verdict.reviewer, verdict.sample


def _supersedes(verdict, there):
    said, before = ((one.verdict, one.probability, one.instructions) for one in (verdict, there))
    return said != before and moment(verdict.time) >= moment(there.time)

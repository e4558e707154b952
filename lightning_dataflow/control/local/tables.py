"""The tables of the SQLite ledger, and the statements on them that its rules are made of."""

import errno
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import SCHEMA_VERSION, UserError
from lightning_dataflow.contracts.records import OLD_SCHEMA_VERSION
from lightning_dataflow.contracts.validation import check_schema
from lightning_dataflow.control.leases import Sample
from lightning_dataflow.control.ledger import TOTALS
from lightning_dataflow.control.local.waiting import wait_for_others

SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value);
CREATE TABLE IF NOT EXISTS samples (
    seq INTEGER PRIMARY KEY,
    state TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    tries INTEGER NOT NULL,
    worker TEXT,
    expires REAL NOT NULL,
    generation TEXT
);
CREATE INDEX IF NOT EXISTS samples_by_state ON samples (state, seq);
CREATE TABLE IF NOT EXISTS parts (name TEXT PRIMARY KEY, part TEXT);
"""
COLUMNS = ", ".join(Sample._fields)


class LedgerTables:
    """One connection to the ledger's database, for all threads of a process, and the statements that its rules are made of.

    Args:
        path: see SqliteMetadataStore.

    Raises:
        UserError: the file is not a ledger, or cannot be written.
    """

    def __init__(self, path: str | Path | None):
        self._lock = threading.RLock()
        self._path = path or ":memory:"
        try:
            self.db = sqlite3.connect(self._path, timeout=0.0, isolation_level=None, check_same_thread=False)
            self._prepare()
        except sqlite3.Error as error:
            raise UserError(f"cannot use {path} as a ledger ({error}): choose another channel.path") from error

    def close(self) -> None:
        """Disconnect."""
        with self._lock:
            self.db.close()

    def _prepare(self) -> None:
        self._patiently("PRAGMA journal_mode=WAL")
        self._patiently("PRAGMA synchronous=NORMAL")
        with self.transaction():
            (version,) = self.db.execute("PRAGMA user_version").fetchone()
            if self.db.execute("SELECT name FROM sqlite_master WHERE name = 'run'").fetchone():
                # Release 0.1 made tables and gave no version.
                remedy = "finish the run with the release that began it, or choose another channel.path"
                check_schema(version or OLD_SCHEMA_VERSION, f"the ledger {self._path}", remedy)
                return
            for statement in SCHEMA.split(";\n"):
                self.db.execute(statement)
            self.db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self.set(**dict.fromkeys(TOTALS, 0))

    def rows(self, statement: str, *parameters: Any) -> list[Any]:
        """What a statement that only reads finds."""
        with self._lock, self._explained():
            return self._patiently(statement, *parameters).fetchall()

    def run(self) -> dict[str, Any]:
        """All that is known of the run, by name."""
        return dict(self.rows("SELECT key, value FROM run WHERE value IS NOT NULL"))

    def set(self, **values: Any) -> None:
        """Write values of the run."""
        self.db.executemany("INSERT OR REPLACE INTO run VALUES (?, ?)", list(values.items()))

    def add(self, **values: int) -> None:
        """Add to counts of the run."""
        changes = [(change, name) for name, change in values.items() if change]
        self.db.executemany("UPDATE run SET value = value + ? WHERE key = ?", changes)

    def report(self, name: str, part: Mapping[str, Any]) -> None:
        """Keep what a process says of itself now."""
        text = json.dumps({**part, "seen": time.time()})
        self.db.execute("INSERT OR REPLACE INTO parts VALUES (?, ?)", (name, text))

    def first_open(self, now: float) -> int | None:
        """The lowest seq that is wanted again, or whose lease expired."""
        return self.db.execute(
            "SELECT MIN(seq) FROM samples WHERE state IN ('wanted', 'leased') AND expires < ?", (now,)
        ).fetchone()[0]

    def samples(self, seqs: Sequence[int]) -> dict[int, Sample]:
        """The rows of consecutive seqs, where there are any."""
        rows = self.db.execute(
            f"SELECT seq, {COLUMNS} FROM samples WHERE seq BETWEEN ? AND ? ORDER BY seq", (seqs[0], seqs[-1])
        )
        return {seq: Sample(*columns) for seq, *columns in rows}

    def put(self, samples: Mapping[int, Sample]) -> None:
        """Write rows by seq."""
        rows = [(seq, *sample) for seq, sample in samples.items()]
        self.db.executemany(f"INSERT OR REPLACE INTO samples (seq, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def drop(self, seqs: Iterable[int]) -> None:
        """Remove rows and what they reserved."""
        freed = self.db.execute(
            "DELETE FROM samples WHERE seq IN (SELECT value FROM json_each(?)) RETURNING bytes", (json.dumps(list(seqs)),)
        ).fetchall()
        if freed:
            self.add(bytes_in_flight=-sum(size for (size,) in freed), refs_in_flight=-len(freed))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and nobody else in between; an exception inside undoes it."""
        with self._lock, self._explained():
            try:
                self._patiently("BEGIN IMMEDIATE")
                yield
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:  # SQLite undoes it itself when the disk is full; or it had not begun
                    self.db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the file in terms of what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path)) from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise
            raise UserError(
                f"the ledger {self._path} is damaged ({error}): put back an undamaged copy of its folder, or start again "
                "under another run_name"
            ) from error

    def _patiently(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        """Execute; while other processes hold the file, try again. SQLite's own pauses would grow to 0.1 s."""
        return wait_for_others(lambda: self.db.execute(statement, parameters), f"use the ledger {self._path}")

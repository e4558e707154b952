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

from lightning_dataflow.contracts import PeerTimeoutError, UserError
from lightning_dataflow.control.ledger import MAX_ATTEMPTS, TOTALS, Lease

BUSY_TIMEOUT_S = 30.0
BUSY_PAUSE_S = 0.0001
"""Between two tries to begin a transaction: they take less than that, SQLite's own pauses grow to 0.1 s."""
_COLUMNS = ", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in TOTALS)
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS totals (id INTEGER PRIMARY KEY CHECK (id = 1), {_COLUMNS});
CREATE TABLE IF NOT EXISTS samples (
    seq INTEGER PRIMARY KEY,
    state TEXT NOT NULL,      -- leased | wanted | published
    attempt INTEGER NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,  -- failures in this run; attempts also count those of earlier ones
    worker TEXT,
    expires REAL,
    generation TEXT,
    bytes INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS samples_by_state ON samples (state, seq);
CREATE TABLE IF NOT EXISTS parts (name TEXT PRIMARY KEY, host TEXT, pid INTEGER, seen REAL, state TEXT, failed INTEGER);
"""
IN_LIST = "seq IN (SELECT value FROM json_each(?))"


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
        with self.transaction():
            self.db.execute("INSERT OR IGNORE INTO totals (id) VALUES (1)")

    def close(self) -> None:
        """Disconnect."""
        with self._lock:
            self.db.close()

    def _prepare(self) -> None:
        self._patiently("PRAGMA journal_mode=WAL")
        self._patiently("PRAGMA synchronous=NORMAL")
        for statement in SCHEMA.split(";\n"):
            self._patiently(statement)

    def parts(self) -> list[tuple[str, str, int, float, str, int]]:
        """(name, host, process id, when it was seen, state, failed) of each process of the run."""
        with self._lock:
            return self._patiently("SELECT name, host, pid, seen, state, failed FROM parts ORDER BY name").fetchall()

    def first_open(self, now: float) -> int | None:
        """The lowest seq that is wanted again, or whose lease expired."""
        row = self.db.execute(
            "SELECT MIN(seq) FROM (SELECT MIN(seq) AS seq FROM samples WHERE state = 'wanted' UNION ALL "
            "SELECT MIN(seq) FROM samples WHERE state = 'leased' AND expires < ?)",
            (now,),
        ).fetchone()
        return row[0]

    def open_in(self, seqs: Sequence[int], now: float) -> dict[int, int]:
        """Those of `seqs` that are to be captured again, with the bytes reserved for them."""
        rows = self.db.execute(
            "SELECT seq, bytes FROM samples WHERE seq BETWEEN ? AND ? AND (state = 'wanted' OR "
            "(state = 'leased' AND expires < ?)) ORDER BY seq",
            (seqs[0], seqs[-1], now),
        )
        return dict(rows.fetchall())

    def reserve(self, sizes: Mapping[int, int], new: Sequence[int], totals: Mapping[str, int]) -> None:
        """Make room for `sizes`, seq → bytes; `new` seqs move the frontier."""
        if not sizes:
            return
        self.db.executemany(
            "INSERT INTO samples (seq, state, attempt, bytes) VALUES (?, 'wanted', 0, ?) "
            "ON CONFLICT (seq) DO UPDATE SET bytes = excluded.bytes",
            list(sizes.items()),
        )
        self.add(bytes_in_flight=sum(sizes.values()), refs_in_flight=len(new))
        if new:
            self.set_totals(frontier=new[-1] + 1)

    def take(self, worker: str, wanted: Sequence[int], expires: float) -> tuple[int, int]:
        """Take over `wanted` with one attempt for all, higher than that of any lease that expired; that counts as a try.

        Returns that attempt, and the most tries of any of them.
        """
        (attempt,) = self.db.execute(
            "SELECT MAX(attempt + (state = 'leased')) FROM samples WHERE seq BETWEEN ? AND ? AND state != 'published'",
            (wanted[0], wanted[-1]),
        ).fetchone()
        tries = self.db.execute(
            "UPDATE samples SET tries = tries + (state = 'leased'), state = 'leased', attempt = ?, worker = ?, expires = ? "
            f"WHERE {IN_LIST} RETURNING tries",
            (attempt, worker, expires, json.dumps(wanted)),
        ).fetchall()
        return attempt, max(tries)[0]

    def held(self, lease: Lease) -> list[int]:
        """Seqs of a lease that nobody took over. An expired lease holds until somebody does."""
        rows = self.db.execute(
            "SELECT seq FROM samples WHERE state = 'leased' AND worker = ? AND attempt = ? AND seq BETWEEN ? AND ?",
            (lease.worker, lease.attempt, lease.seqs[0], lease.seqs[-1]),
        )
        return [seq for (seq,) in rows if seq in lease.wanted]

    def want_again(self, seq: int, attempt: int, counts: bool = True) -> bool:
        """False when it has failed too often."""
        (tries,) = self.db.execute(
            "UPDATE samples SET state = 'wanted', attempt = ?, tries = tries + ?, worker = NULL, generation = NULL "
            "WHERE seq = ? RETURNING tries",
            (attempt, counts, seq),
        ).fetchone()
        return tries < MAX_ATTEMPTS

    def drop(self, seqs: Iterable[int]) -> None:
        """Remove rows and what they reserved."""
        freed = self.db.execute(
            f"DELETE FROM samples WHERE {IN_LIST} RETURNING bytes", (json.dumps(list(seqs)),)
        ).fetchall()
        if freed:
            self.add(bytes_in_flight=-sum(size for (size,) in freed), refs_in_flight=-len(freed))

    def num_bytes(self, seqs: Sequence[int]) -> int:
        """Reserved or published bytes of `seqs`."""
        row = self.db.execute(f"SELECT TOTAL(bytes) FROM samples WHERE {IN_LIST}", (json.dumps(seqs),)).fetchone()
        return int(row[0])

    def published_below(self, seq: int) -> tuple[int, int]:
        """(samples, bytes) that were trained and not freed."""
        row = self.db.execute(
            "SELECT COUNT(*), TOTAL(bytes) FROM samples WHERE state = 'published' AND seq < ?", (seq,)
        ).fetchone()
        return row[0], int(row[1])

    def get(self, key: str) -> str | None:
        """A setting of the run."""
        with self._lock:
            row = self._patiently("SELECT value FROM run WHERE key = ?", key).fetchone()
        return row[0] if row else None

    def set(self, key: str, value: str | None) -> None:
        """Write a setting of the run."""
        self.db.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, value))

    def totals(self) -> dict[str, int]:
        """All counts."""
        row = self.db.execute(f"SELECT {', '.join(TOTALS)} FROM totals").fetchone()
        return dict(zip(TOTALS, row, strict=True))

    def in_flight(self) -> tuple[int, int]:
        """(references, bytes)."""
        with self._lock:
            refs, num_bytes = self._patiently("SELECT refs_in_flight, bytes_in_flight FROM totals").fetchone()
        return refs, num_bytes

    def set_totals(self, **values: int) -> None:
        """Write counts."""
        self.db.execute(f"UPDATE totals SET {', '.join(f'{name} = ?' for name in values)}", tuple(values.values()))

    def add(self, **values: int) -> None:
        """Add to counts."""
        changes = ", ".join(f"{name} = {name} + ?" for name in values)
        self.db.execute(f"UPDATE totals SET {changes}", tuple(values.values()))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and nobody else in between; an exception inside undoes it."""
        with self._lock, self._explained():
            self._patiently("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:  # SQLite has undone it itself when the disk is full
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
        """Execute, and wait for other processes while they hold the file."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                return self.db.execute(statement, parameters)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise PeerTimeoutError(
                        f"could not use the ledger {self._path} within {BUSY_TIMEOUT_S:.0f} s ({error}): is a process of "
                        "the run stopped inside a write? Continue or end it"
                    ) from error
                time.sleep(BUSY_PAUSE_S)

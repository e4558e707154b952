"""MetadataStores `sqlite` (a file, for the processes of one machine) and `memory` (for the threads of one process)."""

import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import PeerTimeoutError, UserError
from lightning_dataflow.control.base import MAX_ATTEMPTS, Lease, MetadataStore, RunPlan, Watermarks

BUSY_TIMEOUT_S = 30.0
BUSY_PAUSE_S = 0.0001
"""Between two tries to begin a transaction: they take less than that, SQLite's own pauses grow to 0.1 s."""
TOTALS = (
    "frontier",
    "bytes_in_flight",
    "refs_in_flight",
    "published",
    "recaptured",
    "given_up",
    "trained_seq",
    "trained_step",
    "durable_seq",
    "durable_step",
    "paused",
    "capture_waits",
    "train_waits",
)
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


class SqliteMetadataStore(MetadataStore):
    """The ledger in SQLite.

    Rows exist only for samples in flight, so file and memory stay small however long the run is. Every call is one
    transaction. It survives the death of any process, not a loss of power.

    Args:
        path: of the file, in an existing folder; None keeps the ledger in the memory of this process.

    Raises:
        UserError: the file is not a ledger, cannot be written, or was made on another machine.
    """

    def __init__(self, path: str | Path | None = None):
        self._lock = threading.RLock()
        self._host = socket.gethostname()
        self._path = path or ":memory:"
        try:
            self._db = sqlite3.connect(self._path, timeout=0.0, isolation_level=None, check_same_thread=False)
            self._prepare()
        except sqlite3.Error as error:
            raise UserError(f"cannot use {path} as a ledger ({error}): choose another channel.path") from error
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO totals (id) VALUES (1)")
            self._db.execute("INSERT OR IGNORE INTO run VALUES ('host', ?)", (self._host,))
        host = self._get("host")
        if host != self._host:
            raise UserError(
                f"the ledger {path} was made on {host}, this is {self._host}: SQLite serves the processes of one machine, "
                f"so start producers and trainers on {host}; if that machine is gone, delete the file, and the trainer "
                "rebuilds it from the log"
            )

    def _prepare(self) -> None:
        self._patiently("PRAGMA journal_mode=WAL")
        self._patiently("PRAGMA synchronous=NORMAL")
        for statement in SCHEMA.split(";\n"):
            self._patiently(statement)

    def fence(self) -> dict[int, int]:
        """See MetadataStore."""
        with self._transaction():
            self._db.execute(
                "UPDATE samples SET state = 'wanted', attempt = attempt + 1, worker = NULL WHERE state = 'leased'"
            )
            self._set("plan", None)
            return dict(self._db.execute("SELECT seq, attempt FROM samples WHERE state = 'wanted'").fetchall())

    def begin(
        self, plan: RunPlan, *, published: Mapping[int, tuple[str, int]], wanted: Mapping[int, int], frontier: int
    ) -> None:
        """See MetadataStore."""
        rows: list[tuple[int, str, int, str | None, int]]
        rows = [(seq, "published", _attempt(generation), generation, size) for seq, (generation, size) in published.items()]
        rows += [(seq, "wanted", attempt, None, 0) for seq, attempt in wanted.items()]
        with self._transaction():
            self._db.execute("DELETE FROM samples")
            self._db.executemany(
                "INSERT INTO samples (seq, state, attempt, generation, bytes) VALUES (?, ?, ?, ?, ?)", rows
            )
            self._db.execute("DELETE FROM parts WHERE failed")
            self._set("plan", json.dumps(asdict(plan)))
            self._set("finished", None)
            self._set_totals(
                frontier=frontier,
                refs_in_flight=len(rows),
                bytes_in_flight=sum(row[-1] for row in rows),
                trained_seq=plan.start,
                trained_step=plan.start // plan.window,
                paused=0,
            )

    def plan(self) -> RunPlan | None:
        """See MetadataStore."""
        text = self._get("plan")
        return None if text is None else RunPlan(**json.loads(text))

    def lease(
        self, worker: str, *, group: int, num_bytes: Callable[[int], int], watermarks: Watermarks, lease_s: float
    ) -> Lease | None:
        """See MetadataStore."""
        with self._transaction():
            plan = self.plan()
            if plan is None or self.finished() is not None:
                return None
            now, totals = time.time(), self._totals()
            seq = self._first_open(now)
            if seq is None:
                seq = totals["frontier"]
                if seq >= plan.stop:
                    return None
            seqs = tuple(range(seq // group * group, min((seq // group + 1) * group, plan.stop)))
            new = [one for one in seqs if one >= totals["frontier"]]
            wanted = self._open_in(seqs, now)
            unreserved = {one: num_bytes(one) for one in (*wanted, *new) if not wanted.get(one)}
            if unreserved and self._must_wait(seq, sum(unreserved.values()), len(new), totals, plan, watermarks):
                return None
            self._reserve(unreserved, new, totals)
            return self._lease(worker, seqs, [*wanted, *new], now + lease_s)

    def renew(self, worker: str, lease_s: float) -> None:
        """See MetadataStore."""
        with self._transaction():
            self._db.execute(
                "UPDATE samples SET expires = ? WHERE state = 'leased' AND worker = ?", (time.time() + lease_s, worker)
            )

    @contextmanager
    def give_back(self, lease: Lease, *, retryable: bool = True, counts: bool = True) -> Iterator[list[int]]:
        """See MetadataStore."""
        with self._transaction():
            mine = self._held(lease)
            if retryable:
                mine = [seq for seq in mine if not self._want_again(seq, lease.attempt + 1, counts)]
            self._give_up(mine)
            yield mine

    @contextmanager
    def commit(self, lease: Lease, generations: Mapping[int, tuple[str, int]]) -> Iterator[list[int]]:
        """See MetadataStore."""
        with self._transaction():
            held = [] if self.finished() is not None else self._held(lease)
            accepted = [seq for seq in held if seq in generations]
            yield accepted
            reserved = self._bytes(accepted)
            committed = sum(generations[seq][1] for seq in accepted)
            self._db.executemany(
                "UPDATE samples SET state = 'published', generation = ?, bytes = ? WHERE seq = ?",
                [(*generations[seq], seq) for seq in accepted],
            )
            self._add(
                bytes_in_flight=committed - reserved,
                published=len(accepted),
                recaptured=len(accepted) if lease.attempt else 0,
            )

    def want(self, seq: int, generation: str) -> bool:
        """See MetadataStore."""
        with self._transaction():
            if self.finished() is not None:
                return True
            row = self._db.execute("SELECT state, attempt, generation FROM samples WHERE seq = ?", (seq,)).fetchone()
            if row is None:
                return False
            state, attempt, current = row
            if state != "published" or current != generation:
                return True  # asked before
            if self._want_again(seq, attempt + 1):
                return True
            self._give_up([seq])
            return False

    def free(self, seqs: Iterable[int]) -> None:
        """See MetadataStore."""
        with self._transaction():
            self._drop(seqs)

    def ack(self, next_seq: int, global_step: int, freed: Iterable[int] = ()) -> None:
        """See MetadataStore."""
        with self._transaction():
            self._drop(freed)
            self._set_totals(trained_seq=next_seq, trained_step=global_step)

    def ack_durable(self, next_seq: int, global_step: int) -> None:
        """See MetadataStore."""
        with self._transaction():
            self._set_totals(durable_seq=next_seq, durable_step=global_step)

    def count_wait(self) -> None:
        """See MetadataStore."""
        with self._transaction():
            self._add(train_waits=1)

    def finish(self, status: str) -> None:
        """See MetadataStore."""
        with self._transaction():
            self._set("finished", status)
            self._set("finished_at", str(time.time()))
            self._db.execute("DELETE FROM samples")
            self._set_totals(bytes_in_flight=0, refs_in_flight=0)

    def finished(self, since: float = 0.0) -> str | None:
        """See MetadataStore."""
        status = self._get("finished")
        return status if status is not None and float(self._get("finished_at") or 0) >= since else None

    def report(self, name: str, state: str, *, failed: bool = False) -> None:
        """See MetadataStore."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?, ?)",
                (name, self._host, os.getpid(), time.time(), state, failed),
            )

    def failures(self) -> Sequence[str]:
        """See MetadataStore."""
        with self._lock:
            rows = self._patiently("SELECT name, state FROM parts WHERE failed ORDER BY name").fetchall()
        return [f"{name}: {state}" for name, state in rows]

    def status(self) -> dict[str, Any]:
        """See MetadataStore."""
        with self._transaction():
            states = dict(self._db.execute("SELECT state, COUNT(*) FROM samples GROUP BY state"))
            parts = self._db.execute("SELECT name, host, pid, seen, state, failed FROM parts ORDER BY name").fetchall()
            plan = self.plan()
            now = time.time()
            return {
                "plan": None if plan is None else asdict(plan),
                "finished": self.finished(),
                **self._totals(),
                "leased": states.get("leased", 0),
                "wanted_again": states.get("wanted", 0),
                "waiting_to_be_trained": states.get("published", 0),
                "parts": [
                    dict(name=name, host=host, pid=pid, seen_s_ago=now - seen, state=state, failed=bool(failed))
                    for name, host, pid, seen, state, failed in parts
                ],
            }

    def close(self) -> None:
        """See MetadataStore."""
        with self._lock:
            self._db.close()

    def _first_open(self, now: float) -> int | None:
        """The lowest seq that is wanted again, or whose lease expired."""
        row = self._db.execute(
            "SELECT MIN(seq) FROM (SELECT MIN(seq) AS seq FROM samples WHERE state = 'wanted' UNION ALL "
            "SELECT MIN(seq) FROM samples WHERE state = 'leased' AND expires < ?)",
            (now,),
        ).fetchone()
        return row[0]

    def _open_in(self, seqs: Sequence[int], now: float) -> dict[int, int]:
        """Those of `seqs` that are to be captured again, with the bytes reserved for them."""
        rows = self._db.execute(
            "SELECT seq, bytes FROM samples WHERE seq BETWEEN ? AND ? AND (state = 'wanted' OR "
            "(state = 'leased' AND expires < ?)) ORDER BY seq",
            (seqs[0], seqs[-1], now),
        )
        return dict(rows.fetchall())

    def _must_wait(
        self, seq: int, num_bytes: int, num_refs: int, totals: Mapping[str, int], plan: RunPlan, marks: Watermarks
    ) -> bool:
        in_bytes, in_refs = totals["bytes_in_flight"], totals["refs_in_flight"]
        fits = in_bytes + num_bytes <= marks.high_bytes and in_refs + num_refs <= marks.high_refs
        low = in_bytes <= marks.low_bytes and in_refs <= marks.low_refs
        paused = not fits or (bool(totals["paused"]) and not low)
        if paused != totals["paused"]:
            self._add(capture_waits=int(paused))
            self._set_totals(paused=int(paused))
        if seq < totals["trained_seq"] + plan.window:  # the trainer waits for it
            lost = num_refs == 0  # of a resumed run; what survived must not keep it out
            return not fits and not lost
        return paused

    def _reserve(self, sizes: Mapping[int, int], new: Sequence[int], totals: Mapping[str, int]) -> None:
        if not sizes:
            return
        self._db.executemany(
            "INSERT INTO samples (seq, state, attempt, bytes) VALUES (?, 'wanted', 0, ?) "
            "ON CONFLICT (seq) DO UPDATE SET bytes = excluded.bytes",
            list(sizes.items()),
        )
        self._add(bytes_in_flight=sum(sizes.values()), refs_in_flight=len(new))
        if new:
            self._set_totals(frontier=new[-1] + 1)

    def _lease(self, worker: str, seqs: tuple[int, ...], wanted: Sequence[int], expires: float) -> Lease:
        """Take over `wanted` with one attempt for all: higher than that of any lease that expired."""
        (attempt,) = self._db.execute(
            "SELECT MAX(attempt + (state = 'leased')) FROM samples WHERE seq BETWEEN ? AND ? AND state != 'published'",
            (wanted[0], wanted[-1]),
        ).fetchone()
        self._db.execute(
            f"UPDATE samples SET state = 'leased', attempt = ?, worker = ?, expires = ? WHERE {IN_LIST}",
            (attempt, worker, expires, json.dumps(wanted)),
        )
        return Lease(worker=worker, seqs=seqs, wanted=tuple(wanted), attempt=attempt)

    def _held(self, lease: Lease) -> list[int]:
        """Seqs of a lease that nobody took over. An expired lease holds until somebody does."""
        rows = self._db.execute(
            "SELECT seq FROM samples WHERE state = 'leased' AND worker = ? AND attempt = ? AND seq BETWEEN ? AND ?",
            (lease.worker, lease.attempt, lease.seqs[0], lease.seqs[-1]),
        )
        return [seq for (seq,) in rows if seq in lease.wanted]

    def _want_again(self, seq: int, attempt: int, counts: bool = True) -> bool:
        """False when it has failed too often."""
        (tries,) = self._db.execute(
            "UPDATE samples SET state = 'wanted', attempt = ?, tries = tries + ?, worker = NULL, generation = NULL "
            "WHERE seq = ? RETURNING tries",
            (attempt, counts, seq),
        ).fetchone()
        return tries < MAX_ATTEMPTS

    def _give_up(self, seqs: Sequence[int]) -> None:
        self._drop(seqs)
        self._add(given_up=len(seqs))

    def _drop(self, seqs: Iterable[int]) -> None:
        freed = self._db.execute(
            f"DELETE FROM samples WHERE {IN_LIST} RETURNING bytes", (json.dumps(list(seqs)),)
        ).fetchall()
        if freed:
            self._add(bytes_in_flight=-sum(size for (size,) in freed), refs_in_flight=-len(freed))

    def _bytes(self, seqs: Sequence[int]) -> int:
        row = self._db.execute(f"SELECT TOTAL(bytes) FROM samples WHERE {IN_LIST}", (json.dumps(seqs),)).fetchone()
        return int(row[0])

    def _get(self, key: str) -> str | None:
        with self._lock:
            row = self._patiently("SELECT value FROM run WHERE key = ?", key).fetchone()
        return row[0] if row else None

    def _set(self, key: str, value: str | None) -> None:
        self._db.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (key, value))

    def _totals(self) -> dict[str, int]:
        row = self._db.execute(f"SELECT {', '.join(TOTALS)} FROM totals").fetchone()
        return dict(zip(TOTALS, row, strict=True))

    def _set_totals(self, **values: int) -> None:
        self._db.execute(f"UPDATE totals SET {', '.join(f'{name} = ?' for name in values)}", tuple(values.values()))

    def _add(self, **values: int) -> None:
        changes = ", ".join(f"{name} = {name} + ?" for name in values)
        self._db.execute(f"UPDATE totals SET {changes}", tuple(values.values()))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._patiently("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def _patiently(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        """Execute, and wait for other processes while they hold the file."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                return self._db.execute(statement, parameters)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise PeerTimeoutError(
                        f"could not use the ledger {self._path} within {BUSY_TIMEOUT_S:.0f} s ({error}): is a process of "
                        "the run stopped inside a write? Continue or end it"
                    ) from error
                time.sleep(BUSY_PAUSE_S)


def _attempt(generation: str) -> int:
    return int(generation.partition("-")[0])

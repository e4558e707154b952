"""MetadataStores `sqlite` (a file, for the processes of one machine) and `memory` (for the threads of one process)."""

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import PeerFailedError, UserError
from lightning_dataflow.contracts.errors import TAKEN_OVER
from lightning_dataflow.control.fields import read_part
from lightning_dataflow.control.leases import MAX_ATTEMPTS, CommitEntry, Lease, NoLease, RunPlan, Sample, Watermarks
from lightning_dataflow.control.ledger import SILENT_S, MetadataStore
from lightning_dataflow.control.local.tables import LedgerTables
from lightning_dataflow.control.log import StreamingRefChannel
from lightning_dataflow.control.processes import this_process

FORGET_PARTS = "DELETE FROM parts WHERE json_extract(part, '$.failed') OR json_extract(part, '$.seen') < ?"


class SqliteMetadataStore(MetadataStore):
    """The ledger in SQLite.

    Rows exist only while a sample is in flight, so the file stays small. Every call is one transaction. A killed process
    loses nothing; a power cut may.

    Args:
        path: of the file, in an existing folder; None keeps the ledger in the memory of this process.

    Raises:
        UserError: the file is not a ledger, is from another release or another machine, or is not writable.
    """

    def __init__(self, path: str | Path | None = None):
        self._tables = LedgerTables(path)
        here = socket.gethostname()
        with self._tables.transaction():
            self._tables.db.execute("INSERT OR IGNORE INTO run VALUES ('host', ?)", (here,))
        host = self._tables.run()["host"]
        if host != here:
            raise UserError(
                f"the ledger {path} belongs to {host}, and this is {here}: run all processes on {host}; or, if that "
                "machine is gone, delete the file, and the trainer rebuilds it from the log"
            )

    def fence(self) -> dict[int, int]:
        with self._change():
            self._tables.db.execute(
                "UPDATE samples SET state = 'wanted', attempt = attempt + 1, expires = 0 WHERE state = 'leased'"
            )
            self._tables.set(plan=None)
            return dict(self._tables.db.execute("SELECT seq, attempt FROM samples WHERE state = 'wanted'").fetchall())

    def begin(self, plan: RunPlan, samples: Mapping[int, Sample], frontier: int) -> None:
        with self._change():
            self._tables.db.execute("DELETE FROM samples")
            self._tables.put(samples)
            self._tables.db.execute(FORGET_PARTS, (time.time() - SILENT_S,))
            self._tables.set(
                plan=json.dumps(asdict(plan)),
                finished=None,
                finished_at=None,
                frontier=frontier,
                refs_in_flight=len(samples),
                bytes_in_flight=sum(sample.bytes for sample in samples.values()),
                trained_seq=plan.start,
                trained_step=plan.start // plan.window,
                paused=0,
            )

    def lease(
        self, worker: str, *, group: int, num_bytes: Callable[[int], int], watermarks: Watermarks, lease_s: float
    ) -> Lease | NoLease:
        with self._change():
            now, plan, totals = time.time(), self.plan(), self._tables.run()
            if "finished_at" in totals:
                return NoLease("finished", plan, totals["finished_at"])
            if plan is None:
                return NoLease("not begun")
            seq = self._tables.first_open(now)
            if seq is None:
                seq = totals["frontier"]
                if seq >= plan.stop:
                    return NoLease("nothing left", plan)
            seqs = tuple(range(seq // group * group, min((seq // group + 1) * group, plan.stop)))
            new = {number: Sample("wanted", 0) for number in seqs if number >= totals["frontier"]}
            others = {number: row for number, row in self._tables.samples(seqs).items() if row.state != "published"} | new
            attempt = max(row.attempt + (row.state == "leased") for row in others.values())
            taken = {number: row for number, row in others.items() if row.expires < now}
            sizes = {number: num_bytes(number) for number, row in taken.items() if not row.bytes}
            if sizes and self._update_pause(seq, sum(sizes.values()), len(new), totals, plan, watermarks):
                return NoLease("paused", plan)
            for number, row in taken.items():
                size, tries = sizes.get(number, row.bytes), row.tries + (row.state == "leased")
                taken[number] = Sample("leased", attempt, size, tries, worker, now + lease_s)
            self._tables.put(taken)
            self._tables.add(bytes_in_flight=sum(sizes.values()), refs_in_flight=len(new))
            self._tables.set(frontier=max(totals["frontier"], seqs[-1] + 1))
            most_tries = max(row.tries for row in taken.values())
            return Lease(worker=worker, seqs=seqs, wanted=tuple(taken), attempt=attempt, plan=plan, tries=most_tries)

    def renew(self, worker: str, lease_s: float) -> None:
        with self._change():
            now = time.time()
            self._tables.db.execute(
                "UPDATE samples SET expires = ? WHERE state = 'leased' AND worker = ? AND expires >= ?",
                (now + lease_s, worker, now),
            )

    def give_back(self, lease: Lease, skips: Mapping[int, bytes], log: StreamingRefChannel, counts: bool) -> list[int]:
        with self._change():
            held = self._held(lease)
            given_up = [seq for seq, row in held.items() if not self._want(seq, row, counts)]
            if given_up:
                log.append([skips[seq] for seq in given_up])
            return given_up

    def commit(self, lease: Lease, captured: Mapping[int, CommitEntry], log: StreamingRefChannel) -> list[int]:
        with self._change():
            held = {} if self.finished() is not None else self._held(lease)
            accepted = {seq: row for seq, row in held.items() if seq in captured}
            if not accepted:
                return []
            log.append([captured[seq].line for seq in accepted])
            published = {}
            for seq, row in accepted.items():
                generation, size, _ = captured[seq]
                if generation:
                    published[seq] = Sample("published", row.attempt, size, row.tries, generation=generation)
            self._tables.put(published)
            self._tables.drop(accepted.keys() - published.keys())
            self._tables.add(
                bytes_in_flight=sum(sample.bytes - accepted[seq].bytes for seq, sample in published.items()),
                published=len(published),
                recaptured=len(published) if lease.attempt else 0,
                given_up=len(accepted) - len(published),
            )
            return list(accepted)

    def want(self, seq: int, generation: str) -> bool:
        with self._change():
            if self.finished() is not None:
                return True
            row = self._tables.samples([seq]).get(seq)
            if row is None:
                return False
            was_asked_before = row.state != "published" or row.generation != generation
            return was_asked_before or self._want(seq, row)

    def count_wait(self) -> None:
        with self._change():
            self._tables.add(train_waits=1)

    def finish(self, status: str) -> None:
        with self._change():
            self._tables.db.execute("DELETE FROM samples")
            self._tables.set(finished=status, finished_at=time.time(), bytes_in_flight=0, refs_in_flight=0)

    def now(self) -> float:
        return time.time()

    def report(self, name: str, state: str, *, failed: bool = False, fatal: bool = False) -> None:
        with self._change():
            self._tables.report(name, this_process(state, failed=failed, fatal=fatal))

    def claim(self, name: str, state: str, before: tuple[str, int] | None) -> bool:
        with self._tables.transaction():
            text = self._part_texts().get(name)
            last = None if text is None else read_part(name, text, time.time())
            if before != (None if last is None else (last["host"], last["pid"])):
                return False
            me = this_process(state)
            self.term = str(int(self._tables.run().get("term", 0)) + 1)
            claimed_by = f"process {me['pid']} on {me['host']}"
            self._tables.set(term=self.term, claimed_by=claimed_by, plan=None, finished=None, finished_at=None)
            self._tables.report(name, me)
            return True

    def in_flight(self) -> tuple[int, int]:
        totals = self._tables.run()
        return totals["refs_in_flight"], totals["bytes_in_flight"]

    def close(self) -> None:
        self._tables.close()

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._tables.transaction():
            if not self.is_ours():
                raise PeerFailedError(TAKEN_OVER.format(self._tables.run().get("claimed_by")))
            yield

    def _update_pause(
        self, seq: int, num_bytes: int, num_refs: int, totals: Mapping[str, int], plan: RunPlan, marks: Watermarks
    ) -> bool:
        in_bytes, in_refs = totals["bytes_in_flight"], totals["refs_in_flight"]
        fits = in_bytes + num_bytes <= marks.high_bytes and in_refs + num_refs <= marks.high_refs
        low = in_bytes <= marks.low_bytes and in_refs <= marks.low_refs
        paused = not fits or (bool(totals["paused"]) and not low)
        if paused != totals["paused"]:
            self._tables.add(capture_waits=int(paused))
            self._tables.set(paused=int(paused))
        if seq < totals["trained_seq"] + plan.window:  # the trainer waits for it
            lost = num_refs == 0  # of a resumed run; what survived must not keep it out
            return not fits and not lost
        return paused

    def _update(self, totals: Mapping[str, int], freed: Iterable[int]) -> None:
        with self._change():
            self._tables.drop(freed)
            self._tables.set(**totals)

    def _run_values(self) -> Mapping[str, Any]:
        return self._tables.run()

    def _sample_states(self) -> Mapping[int, tuple[str, int]]:
        return {seq: (state, size) for seq, state, size in self._tables.rows("SELECT seq, state, bytes FROM samples")}

    def _part_texts(self) -> Mapping[str, str]:
        return dict(self._tables.rows("SELECT name, part FROM parts"))

    def _held(self, lease: Lease) -> dict[int, Sample]:
        """What nobody took over of a lease. An expired lease holds until somebody does."""
        rows = {seq: row for seq, row in self._tables.samples(lease.seqs).items() if seq in lease.wanted}
        mine = ("leased", lease.worker, lease.attempt)
        return {seq: row for seq, row in rows.items() if (row.state, row.worker, row.attempt) == mine}

    def _want(self, seq: int, row: Sample, counts: bool = True) -> bool:
        """Have a sample captured again; False when it has failed too often and is given up."""
        if row.tries + counts < MAX_ATTEMPTS:
            self._tables.put({seq: Sample("wanted", row.attempt + 1, row.bytes, row.tries + counts)})
            return True
        self._tables.drop([seq])
        self._tables.add(given_up=1)
        return False

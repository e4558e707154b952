"""The ledger in a file, and processes that share it."""

import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from lightning_dataflow.contracts import PeerTimeoutError, UserError
from lightning_dataflow.control import MAX_ATTEMPTS, SqliteMetadataStore
from lightning_dataflow.control.leases import CommitEntry
from lightning_dataflow.control.local import tables, waiting
from lightning_dataflow.control.local.log import FileChannel
from tests.records import forked
from tests.unit.control.ledgers import begin, commit, in_flight, lease


@pytest.fixture
def failing_log(tmp_path, monkeypatch):
    """A log whose file cannot be written."""
    log = FileChannel(tmp_path / "failing")

    def fail(lines):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "append", fail)
    return log


@pytest.mark.parametrize("path", [None, "ledger.sqlite"])
def test_a_log_that_cannot_be_written_undoes_what_goes_with_it(tmp_path, failing_log, path):
    ledger = SqliteMetadataStore(path and tmp_path / path)
    begin(ledger)
    for _ in range(MAX_ATTEMPTS - 1):
        lease(ledger, lease_s=-1)
    tried_twice, found = lease(ledger), lease(ledger)
    captured = {seq: CommitEntry(generation="0-0", num_bytes=1, line=b"") for seq in found.wanted}
    with pytest.raises(OSError, match="No space left"):
        ledger.commit(found, captured, failing_log)
    with pytest.raises(OSError, match="No space left"):
        ledger.give_back(tried_twice, dict.fromkeys(tried_twice.wanted, b""), failing_log, True)
    assert ledger.status()["published"] == ledger.status()["given_up"] == 0
    ledger.commit(found, captured, FileChannel(tmp_path))
    assert ledger.status()["published"] == 4


def work(path: Path, worker: str) -> None:
    ledger = SqliteMetadataStore(path)
    with open(path.parent / worker, "w") as mine:
        while (found := lease(ledger, worker, group=2)) is not None:
            for seq in commit(ledger, found):
                mine.write(f"{seq}\n")


@pytest.mark.integration
def test_several_processes_on_one_file(tmp_path):
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteMetadataStore(path)
    begin(ledger, stop=600)
    ledger.close()  # SQLite's connections do not survive a fork
    workers = [forked(work, path, f"worker-{index}") for index in range(4)]
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    seqs = [int(line) for file in tmp_path.glob("worker-*") for line in file.read_text().splitlines()]
    assert sorted(seqs) == list(range(600))
    assert in_flight(SqliteMetadataStore(path)) == (600, 6000)


def open_and_report(path: Path, name: str) -> None:
    SqliteMetadataStore(path).report(name, "here")


def test_several_processes_open_a_new_file_at_once(tmp_path):
    path = tmp_path / "ledger.sqlite"
    processes = [forked(open_and_report, path, f"part-{index}") for index in range(8)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(SqliteMetadataStore(path).status()["parts"]) == 8


def test_a_process_that_is_stopped_inside_a_write_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "TIMEOUT_S", 0.05)
    path = tmp_path / "ledger.sqlite"
    ledger, other = SqliteMetadataStore(path), SqliteMetadataStore(path)
    begin(ledger)
    found = lease(ledger)
    with (
        pytest.raises(PeerTimeoutError, match=r"could not use the ledger .*locked.* is a process of the run stopped"),
        ledger._tables.transaction(),
    ):
        other.ack(1, 1)
    assert other.finished() is None
    assert commit(ledger, found) == [0, 1, 2, 3]


def hold_and_stop(path: Path, number: int) -> None:
    ledger = SqliteMetadataStore(path)
    with ledger._tables.transaction():
        (path.parent / "held").touch()
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_stops_or_dies_inside_a_write_blocks_for_a_bounded_time(tmp_path, monkeypatch, number):
    """A stopped one for TIMEOUT_S, and until it goes on; a killed one not at all."""
    monkeypatch.setattr(waiting, "TIMEOUT_S", 0.3)
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteMetadataStore(path)
    begin(ledger)
    holder = forked(hold_and_stop, path, number)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    start = time.monotonic()
    if number == signal.SIGKILL:
        holder.join()
        assert lease(ledger).seqs == (0, 1, 2, 3)
    else:
        with pytest.raises(PeerTimeoutError, match="is a process of the run stopped inside a write"):
            lease(ledger)
        assert ledger.finished() is None  # readers are not blocked
        holder.kill()
        holder.join()
        assert lease(ledger).seqs == (0, 1, 2, 3)
    assert time.monotonic() - start < 2


def test_a_ledger_of_another_machine(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    SqliteMetadataStore(path).close()
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with pytest.raises(UserError, match=r"belongs to .*, and this is elsewhere: .* delete the file"):
        SqliteMetadataStore(path)


def test_a_ledger_of_release_0_1_is_refused_by_its_version(tmp_path):
    path = tmp_path / "ledger.sqlite"
    old = sqlite3.connect(path)
    old.executescript("CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT); CREATE TABLE totals (id INTEGER PRIMARY KEY);")
    old.close()
    with pytest.raises(UserError) as error:
        SqliteMetadataStore(path)
    assert str(error.value) == (
        f"the ledger {path} has schema version 2 (of lightning_dataflow 0.1), this release reads 3: finish the run with "
        "the release that began it, or choose another channel.path"
    )


def test_files_that_are_no_ledgers(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_text("not a database, but long enough to be looked at as one" * 20)
    for wrong in (path, tmp_path, tmp_path / "nowhere" / "ledger.sqlite"):
        with pytest.raises(UserError, match=r"cannot use .* as a ledger .*: choose another channel\.path"):
            SqliteMetadataStore(wrong)


def test_a_ledger_that_is_damaged_while_it_is_used(tmp_path):
    path = tmp_path / "ledger.sqlite"
    ledger = SqliteMetadataStore(path)
    begin(ledger, stop=5000, window=8)
    for _ in range(50):
        commit(ledger, lease(ledger, group=8))
    ledger.close()
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\x55" * (size - 4096))
    with pytest.raises(UserError, match=r"(the ledger .* is damaged|as a ledger) .*(malformed|not a database)"):
        again = SqliteMetadataStore(path)
        commit(again, lease(again, group=8))


def test_a_full_disk_is_an_error_of_the_system_with_the_path(tmp_path):
    ledger = SqliteMetadataStore(tmp_path / "ledger.sqlite")
    begin(ledger, stop=50000, window=8)
    (pages,) = ledger._tables.db.execute("PRAGMA page_count").fetchone()
    ledger._tables.db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match=r"No space left on device: .*ledger\.sqlite"):
        for _ in range(1000):
            commit(ledger, lease(ledger, group=8))
    ledger._tables.db.execute("PRAGMA max_page_count = 100000")
    commit(ledger, lease(ledger, group=8))  # and it goes on where there is room again


def test_an_interrupt_as_a_transaction_begins_leaves_none_open(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    ledger, other = SqliteMetadataStore(path), SqliteMetadataStore(path)
    begin(ledger)

    def interrupt(act, purpose):
        act()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tables, "wait_for_others", interrupt)
        lease(ledger)
    assert lease(other).seqs == (0, 1, 2, 3)
    ledger.finish("interrupted")
    assert other.finished() == "interrupted"


@pytest.mark.parametrize("act", [lease, lambda ledger: ledger.renew("b", 60)], ids=["lease", "renew"])
def test_a_call_costs_the_same_however_many_samples_are_wanted(act):
    """As many as there are, after a store was lost. The cost is counted in instructions of SQLite."""

    def cost(num_wanted: int) -> int:
        ledger, counted = SqliteMetadataStore(), []
        begin(ledger, stop=10000, wanted=dict.fromkeys(range(num_wanted), 1), frontier=num_wanted)
        ledger._tables.db.set_progress_handler(lambda: counted.append(1), 1)
        act(ledger)
        return len(counted)

    assert cost(5000) < 1.2 * cost(50)


def test_the_file_stays_small(tmp_path):
    ledger = SqliteMetadataStore(tmp_path / "ledger.sqlite")
    begin(ledger, stop=5000, window=8)
    for seq in range(0, 5000, 8):
        commit(ledger, lease(ledger, group=8))
        ledger.free(range(seq, seq + 8))
        ledger.ack(seq + 8, seq // 8 + 1)
    assert in_flight(ledger) == (0, 0)
    ledger.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 64 << 10
    rows = sqlite3.connect(tmp_path / "ledger.sqlite").execute("SELECT COUNT(*) FROM samples").fetchone()
    assert rows == (0,)

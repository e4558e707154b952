"""Which processes are started again, which end the run, and what is logged about it; stand-ins end as they are told."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_dataflow.checkpoints.markers import mark_complete
from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.control import RunPlan, SqliteMetadataStore
from lightning_dataflow.supervise import watch as watch_module
from lightning_dataflow.supervise.watch import Restarts, Watch
from tests.records import WIDE

KILLED = (-9, "was killed by SIGKILL", True)
BAD_SETTINGS = (1, "no such target", False)


class StandIn:
    """Ends in the given ways, one start after the other; `None` runs until the watch has looked a few times."""

    def __init__(self, name: str, *ends):
        self.name, self.ends, self.starts = name, [*ends], []
        self.start()

    def start(self, *more: str) -> None:
        self.starts.append(more)
        self.status, self.how, self.temporary = self.ends.pop(0) if self.ends else (0, "", True)
        self.looks = 5
        self.process = SimpleNamespace(poll=self.poll, pid=len(self.starts))

    def poll(self):
        self.looks -= 1
        return None if self.looks > 0 or self.status is None else self.status

    def exit_reason(self) -> str:
        return self.how

    def is_retryable(self) -> bool:
        return self.temporary

    def is_running(self) -> bool:
        return self.poll() is None

    def kill(self) -> None: ...

    def drain(self) -> None: ...


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(watch_module, "POLL_S", 0.001)
    monkeypatch.setattr(watch_module, "FIRST_FAILURE_S", 0.01)
    monkeypatch.setattr(watch_module, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(watch_module, "PRODUCERS_END_S", 0.05)


@pytest.fixture
def ledger():
    return SqliteMetadataStore()


def running(name: str) -> StandIn:
    return StandIn(name, (None, "", True))


def run(tmp_path, ledger, producers, trainer, limit: int) -> Restarts:
    restarts = Restarts(limit)
    Watch(producers, trainer, [], ledger, tmp_path, restarts).run()
    return restarts


def test_what_died_starts_again_up_to_the_limit(tmp_path, ledger, caplog):
    producer, trainer = StandIn("producer-0", KILLED, KILLED), StandIn("trainer", KILLED)
    trainer.looks = 200
    restarts = run(tmp_path, ledger, [producer], trainer, 2)
    assert restarts.counts == {"producer-0": 2, "trainer": 1}
    assert trainer.starts == [(), ()]  # no checkpoint: from the start
    assert "producer-0: was killed by SIGKILL; starts again in 0 s, restart 2 of 2" in caplog.messages


class StubbornServer(StandIn):
    """Dies once, and does not get ready in the first so many attempts to start it again."""

    log_path, keeps_data, restart_pause_s = Path("server.log"), True, 0.0

    def __init__(self, failures: int):
        self.failures, self.num_stops = failures, 0
        super().__init__("redis-server", KILLED)

    def start(self, *more: str) -> None:
        if self.starts and self.failures:
            self.failures -= 1
            raise UserError("redis-server was not ready within 1 s")
        super().start(*more)

    def stop(self) -> None:
        self.num_stops += 1

    def poll(self):
        return super().poll() if len(self.starts) == 1 else None


@pytest.mark.integration
@pytest.mark.parametrize(("failures", "limit"), [(1, 2), (2, 2)])
def test_a_server_that_does_not_start_again_is_tried_as_often_as_allowed(tmp_path, ledger, failures, limit):
    server, trainer, restarts = StubbornServer(failures), StandIn("trainer", (0, "", True)), Restarts(limit)
    trainer.looks = 500
    watch = Watch([], trainer, [server], ledger, tmp_path, restarts)
    if failures < limit:
        watch.run()
    else:
        with pytest.raises(PeerFailedError, match=r"^redis-server did not start again \(redis-server was not ready"):
            watch.run()
    assert restarts.counts == {"redis-server": limit}
    assert server.num_stops == failures, "one that runs and is not ready would pass for one that has started"


def test_a_trainer_goes_on_at_its_checkpoint(tmp_path, ledger):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "step-000004.ckpt"
    path.write_bytes(b"weights")
    mark_complete(path, 4)
    trainer = StandIn("trainer", KILLED)
    run(tmp_path, ledger, [StandIn("producer-0")], trainer, 1)
    assert trainer.starts == [(), ("ckpt_path=auto",)]


@pytest.mark.parametrize(
    ("producers", "trainer", "message"),
    [
        ([KILLED], None, "^producer-0: was killed by SIGKILL$"),
        ([KILLED, KILLED], None, "^producer-0: was killed by SIGKILL; producer-1: was killed by SIGKILL$"),
        ([BAD_SETTINGS, (None, "", True)], None, "^producer-0: no such target$"),
        ([(None, "", True)], KILLED, "^trainer: was killed by SIGKILL$"),
        ([BAD_SETTINGS], KILLED, "^producer-0: no such target$"),  # the cause comes first
    ],
)
def test_what_ends_the_run(tmp_path, ledger, producers, trainer, message):
    stand_ins = [StandIn(f"producer-{index}", end) for index, end in enumerate(producers)]
    with pytest.raises(PeerFailedError, match=message):
        run(tmp_path, ledger, stand_ins, StandIn("trainer", trainer or (None, "", True)), 0)


def test_bad_settings_are_not_tried_again(tmp_path, ledger):
    producer = StandIn("producer-0", BAD_SETTINGS)
    with pytest.raises(PeerFailedError, match="no such target"):
        run(tmp_path, ledger, [producer], running("trainer"), 5)
    assert len(producer.starts) == 1


def test_the_run_goes_on_while_a_producer_lives(tmp_path, ledger, caplog):
    trainer = StandIn("trainer")
    trainer.looks = 50
    other = running("producer-1")
    run(tmp_path, ledger, [StandIn("producer-0", KILLED), other], trainer, 0)
    assert "producer-0: was killed by SIGKILL; the run goes on with producer-1" in caplog.messages
    assert "producer-1 did not end within 0 s of the trainer's end: killed" in caplog.messages


def test_a_producer_that_ended_with_a_failed_trainer_starts_with_the_next(tmp_path, ledger):
    """A trainer that fails with an error tells the producers to finish."""
    trainer, producer = StandIn("trainer", (75, "the store stayed away", True)), StandIn("producer-0", (0, "", True))
    ledger.finish("failed: the store stayed away")
    trainer.looks, start = 20, trainer.start

    def start_slowly(*more):
        start(*more)
        trainer.looks = 50

    trainer.start = start_slowly
    watch = Watch([producer], trainer, [], ledger, tmp_path, restarts := Restarts(1))
    watch._trainer_started = 0.0
    watch.run()
    assert len(producer.starts) >= 2
    assert restarts.counts == {"trainer": 1}
    assert watch.describe() == "watching; started again: trainer ×1"


LEASES = {"group": 4, "num_bytes": lambda seq: 8, "watermarks": WIDE, "lease_s": 60.0}


@pytest.fixture
def leased(ledger, monkeypatch):
    """All but the last group are leased to workers of one process; `leased()` → (seqs, attempt) of the next."""
    ledger.begin(RunPlan(start=0, stop=12, window=4), {}, frontier=0)
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 1)
        for worker in ("producer-host-1-0", "producer-host-1-1"):
            ledger.report(worker, "capturing")
            ledger.lease(worker, **LEASES)

    def lease() -> tuple[tuple[int, ...], int]:
        found = ledger.lease("other", **LEASES)
        return found.seqs, found.attempt

    return lease


def test_the_leases_of_all_workers_of_a_dead_producer_are_free_at_once(tmp_path, ledger, leased):
    trainer = StandIn("trainer")
    trainer.looks = 50
    run(tmp_path, ledger, [StandIn("producer-0", KILLED)], trainer, 1)
    assert [leased() for _ in range(3)] == [((0, 1, 2, 3), 1), ((4, 5, 6, 7), 1), ((8, 9, 10, 11), 0)]


@pytest.fixture
def stay_away(ledger, monkeypatch):
    """stay_away(so many calls of the ledger)."""

    def begin(num_calls: int) -> None:
        left = iter(range(num_calls))

        def wrap(inner):
            def call(*arguments, **options):
                if next(left, None) is not None:
                    raise PeerTimeoutError("Redis could not be used")
                return inner(*arguments, **options)

            return call

        for name in ("now", "status", "renew", "finished"):
            monkeypatch.setattr(ledger, name, wrap(getattr(ledger, name)))

    return begin


def test_processes_that_die_while_the_ledger_is_away_start_when_it_is_back(tmp_path, ledger, leased, stay_away):
    """Each once: their restarts are not used up meanwhile."""
    trainer, forever = StandIn("trainer", KILLED), (None, "", True)
    producers = [StandIn("producer-0", KILLED, forever), StandIn("producer-1", (0, "", True), forever)]
    trainer.looks = 20
    watch = Watch(producers, trainer, [], ledger, tmp_path, restarts := Restarts(1))
    stay_away(100)
    start = trainer.start

    def start_slowly(*more):
        start(*more)
        trainer.looks = 50

    trainer.start = start_slowly
    watch.run()
    assert restarts.counts == {"producer-0": 1, "trainer": 1}
    assert [len(each.starts) for each in (trainer, *producers)] == [2, 2, 2]
    assert [leased() for _ in range(2)] == [((0, 1, 2, 3), 1), ((4, 5, 6, 7), 1)]


def test_a_ledger_that_stays_away_ends_a_run_that_needs_it(tmp_path, ledger, stay_away, monkeypatch):
    monkeypatch.setattr(watch_module, "LEDGER_TIMEOUT_S", 0.05)
    watch = Watch([running("producer-0")], StandIn("trainer", KILLED), [], ledger, tmp_path, restarts := Restarts(3))
    stay_away(10**9)
    with pytest.raises(PeerFailedError, match=r"^cannot restart a process: the ledger has not answered for .* s \(Redis"):
        watch.run()
    assert restarts.counts == {"trainer": 1}


def test_a_dead_producer_hides_no_dead_trainer_while_the_ledger_is_away(tmp_path, ledger, stay_away):
    producers = [StandIn("producer-0", KILLED), StandIn("producer-1", (0, "", True)), running("producer-2")]
    watch = Watch(producers, StandIn("trainer", KILLED), [], ledger, tmp_path, Restarts(0))
    stay_away(10**9)
    with pytest.raises(PeerFailedError, match=r"^trainer: was killed by SIGKILL$"):
        watch.run()

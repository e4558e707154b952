"""Target and trainer in one process, with the full control plane between them."""

import threading
from collections.abc import Sequence

from lightning_dataflow.contracts import PeerFailedError
from lightning_dataflow.contracts.waiting import said_if_long
from lightning_dataflow.control import ControlPlane, RunPlan, Watermarks
from lightning_dataflow.data import PassOrder, RefWindow
from lightning_dataflow.data.streaming import StreamingSource
from lightning_dataflow.data.windows import share_of
from lightning_dataflow.producers.feeds import PromptFeed
from lightning_dataflow.producers.rollout import RolloutWorker
from lightning_dataflow.prompts import PromptDataset
from lightning_dataflow.stores import FeatureStore
from lightning_dataflow.targets import TargetEngine

JOIN_TIMEOUT_S = 30.0


class ColocatedSource(StreamingSource):
    """Captures what this rank trains, through leases, commits, the log and the queue.

    Every rank has a control plane of its own, whose log numbers the rank's slices of the windows without gaps.

    Args:
        plane: of this rank alone.
        threaded: whether a thread captures while the trainer trains (`interleaved`); otherwise the target runs while the
            trainer waits.
    """

    def __init__(
        self,
        prompts: PromptDataset,
        target: TargetEngine,
        plane: ControlPlane,
        store: FeatureStore,
        watermarks: Watermarks,
        *,
        seed: int,
        capture_batch_size: int = 1,
        threaded: bool,
        idle_timeout_s: float = 600.0,
    ):
        self._prompts = prompts
        self.sees_all_skips = False
        self.order = PassOrder(len(prompts), seed)
        self._window, self._share = 1, range(1)
        feed = PromptFeed(prompts, target, seed=seed, run_id=plane.run_id, locate=self._locate)
        self._worker = RolloutWorker("producer", feed, plane, store, watermarks, group=capture_batch_size)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        super().__init__(plane, store, idle_timeout_s=idle_timeout_s, pump=None if threaded else self._pump_once)
        self.prefetch_windows = 2 if threaded else 0
        self._threaded = threaded

    def begin(self, plan: RunPlan, rank: int, world_size: int) -> None:
        """The plan of this rank's own control plane counts its slices alone."""
        self._window, self._share = plan.window, share_of(range(plan.window), rank, world_size)
        share = len(self._share)
        self.shares_any_seqs = world_size == 1
        self._error = None
        super().begin(RunPlan(start=self.log_seq(plan.start), stop=self.log_seq(plan.stop), window=share), 0, world_size)
        if self._threaded:
            self._stopping.clear()
            self._thread = threading.Thread(target=self._produce, name="producer", daemon=True)
            self._thread.start()

    def num_tokens(self, seq: int) -> int:
        return int(self._prompts.lengths[self.order.locate(seq)[0]])

    def window(self, seqs: range, share: Sequence[int]) -> RefWindow:
        """Raises what the producer thread raised."""
        mine = [self.log_seq(seq) for seq in share]
        try:
            window = self.queue.get(mine, mine)
        except PeerFailedError as error:
            assert self._thread is not None, "without a thread, the producer's error is raised where it happens"
            self._join(self._thread)  # it has reported its error, and may not have stored it yet
            raise (self._error or error) from error
        return RefWindow(refs=window.refs, num_tokens=sum(map(self.num_tokens, seqs)))

    def applied(self, seqs: Sequence[int], next_seq: int, global_step: int) -> None:
        super().applied([self.log_seq(seq) for seq in seqs], self.log_seq(next_seq), global_step)

    def durable(self, next_seq: int, global_step: int, freed: Sequence[int] = ()) -> None:
        super().durable(self.log_seq(next_seq), global_step, freed)

    def skipped(self) -> dict[int, str]:
        """This rank's alone."""
        return {self._run_seq(seq): reason for seq, reason in super().skipped().items()}

    def recaptured(self) -> Sequence[int]:
        """This rank's alone."""
        return [self._run_seq(seq) for seq in super().recaptured()]

    def finish(self, status: str) -> None:
        """Raises RuntimeError when the producer thread does not end."""
        self._stopping.set()
        if self._thread is not None:
            self.plane.ledger.finish(status)  # so that the thread no longer waits for room in the store
            self._join(self._thread)
            if self._thread.is_alive():
                raise RuntimeError(f"the producer thread did not end within {JOIN_TIMEOUT_S:.0f} s: it hangs in a capture")
            self._thread = None
        super().finish(status)

    def log_seq(self, seq: int) -> int:
        """The number of `seq` in this rank's log. A window's end maps to the start of the next window."""
        window, position = divmod(seq, self._window)
        return window * len(self._share) + max(0, position - self._share.start)

    def _run_seq(self, log_seq: int) -> int:
        window, position = divmod(log_seq, len(self._share))
        return window * self._window + self._share.start + position

    def _locate(self, log_seq: int) -> tuple[int, int]:
        return self.order.locate(self._run_seq(log_seq))

    def _pump_once(self) -> bool:
        return self._worker.run_once() in ("captured", "failed")

    def _join(self, thread: threading.Thread) -> None:
        with said_if_long("the producer thread to end its capture"):
            thread.join(JOIN_TIMEOUT_S)

    def _produce(self) -> None:
        try:
            self._worker.run(self._stopping.is_set)
        except BaseException as error:  # `window` raises it in the trainer's thread
            self._error = error

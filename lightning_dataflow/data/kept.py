"""Counts trained samples that stay in the store until a checkpoint makes them durable."""

from lightning_dataflow.control import Watermarks


class KeptSamples:
    """Counts the samples that `release_at=durable` keeps, and decides when a checkpoint must free them.

    Kept samples are in flight, so capture would wait when they reach the watermarks, and the trainer, which could free
    them, would wait for capture. So a checkpoint is due while the next window still fits. It is due earlier when they take
    half of what may be in flight, so that capture can run ahead. All ranks count the same windows, so they decide on the
    same checkpoints at the same steps without asking each other.

    Args:
        window: samples of a step, at most.
        group: prompts that are captured together; the group in which a window ends may extend beyond it.
        largest_bytes: payload of the largest sample.
    """

    def __init__(self, marks: Watermarks, *, window: int, group: int, largest_bytes: int):
        next_refs = window + group - 1
        self._most_refs = min(marks.high_refs - next_refs, marks.high_refs // 2)
        self._most_bytes = min(marks.high_bytes - next_refs * largest_bytes, marks.high_bytes // 2)
        self._windows: list[tuple[int, int, int]] = []  # (next seq, refs, bytes)

    def add(self, next_seq: int, num_refs: int, num_bytes: int) -> None:
        """A window that ends before `next_seq` was trained."""
        self._windows.append((next_seq, num_refs, num_bytes))

    def durable(self, next_seq: int) -> None:
        """A complete checkpoint holds all steps before `next_seq`."""
        self._windows = [window for window in self._windows if window[0] > next_seq]

    def must_save(self) -> bool:
        """Whether a checkpoint must be written before the next window is waited for."""
        num_refs = sum(refs for _, refs, _ in self._windows)
        num_bytes = sum(size for _, _, size in self._windows)
        return num_refs > max(self._most_refs, 0) or num_bytes > max(self._most_bytes, 0)

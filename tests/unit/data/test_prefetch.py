import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from lightning_dataflow.contracts import waiting
from lightning_dataflow.data import prefetch as prefetch_module
from lightning_dataflow.data.prefetch import Prefetcher

CPU = torch.device("cpu")


def counted(made: list[int], stop: int) -> Iterator[dict]:
    for index in range(stop):
        made.append(index)
        yield {"index": index}


def test_batches_come_in_order_and_end():
    batches = Prefetcher(counted([], 50), depth=3, device=CPU)
    assert [batch["index"] for batch in batches] == list(range(50))
    batches.close()


def test_no_more_than_the_depth_is_made_ahead():
    made: list[int] = []
    batches = Prefetcher(counted(made, 50), depth=3, device=CPU)
    stream = iter(batches)
    for taken in range(5):
        time.sleep(0.05)
        assert len(made) == taken + 4  # three wait, and one more is being offered
        assert next(stream)["index"] == taken
    batches.close()
    assert len(made) < 10


def test_an_error_comes_after_the_batches_before_it():
    def failing() -> Iterator[dict]:
        yield from counted([], 3)
        raise KeyError("a sample is lost")

    batches = Prefetcher(failing(), depth=8, device=CPU)
    stream = iter(batches)
    time.sleep(0.05)
    assert [next(stream)["index"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="a sample is lost"):
        next(stream)
    batches.close()


def test_closing_while_the_thread_waits_for_room():
    batches = Prefetcher(counted([], 50), depth=1, device=CPU)
    time.sleep(0.05)
    start = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - start < 1
    assert list(batches) == []


def test_closing_while_the_reader_waits_for_a_batch():
    release = threading.Event()

    def slow() -> Iterator[dict]:
        release.wait()
        yield {}

    batches = Prefetcher(slow(), depth=1, device=CPU)
    seen: list[list] = []
    reader = threading.Thread(target=lambda: seen.append(list(batches)))
    reader.start()
    threading.Timer(0.05, release.set).start()
    batches.close()
    reader.join(2)
    assert not reader.is_alive()
    assert len(seen) == 1


def is_interrupted(act: Callable[[], object], number: int) -> bool:
    """Whether `act` gets as far as its bytecode of that number, where a KeyboardInterrupt is raised."""
    numbers = itertools.count()

    def trace(frame, event, argument):
        frame.f_trace_opcodes = True
        if event == "opcode" and next(numbers) == number:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_closing_after_a_reader_that_was_interrupted_anywhere():
    """Locks of `threading` that are written in Python stay locked when the interrupt comes at the wrong bytecode."""

    def close_interrupted_at(number: int) -> bool:
        batches = Prefetcher(counted([], 50), depth=1, device=CPU)
        stream = iter(batches)
        interrupted = is_interrupted(lambda: (next(stream), next(stream)), number)
        closing = threading.Thread(target=batches.close, daemon=True)
        closing.start()
        closing.join(5)
        assert not closing.is_alive(), f"it hangs after an interrupt at bytecode {number}"
        return interrupted

    numbers = itertools.takewhile(close_interrupted_at, itertools.count())
    assert sum(1 for _ in numbers) > 20


def test_tensors_within_tuples_are_copied_too(monkeypatch):
    """As EAGLE3's target rows are. The device `meta` needs no hardware."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    batch = {"ids": torch.ones(2), "rows": (torch.ones(2), torch.ones(3)), "nested": {"x": [torch.ones(1)]}, "names": ["a"]}
    copy = prefetch_module.copy_to(torch.device("meta"), batch)
    assert copy["names"] == ["a"]
    assert [type(copy[name]) for name in ("rows", "nested")] == [tuple, dict]
    assert {tensor.device.type for tensor in (copy["ids"], *copy["rows"], *copy["nested"]["x"])} == {"meta"}


def test_a_read_that_hangs_is_said(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.01)
    monkeypatch.setattr(prefetch_module, "JOIN_TIMEOUT_S", 0.1)
    release = threading.Event()
    batches = Prefetcher(iter(lambda: release.wait() and None, None), depth=1, device=CPU)
    with pytest.raises(RuntimeError, match="the prefetch thread did not end within 0 s: it hangs in a read"):
        batches.close()
    release.set()
    assert "waiting for the prefetch thread to end its read, for 0 s so far" in caplog.text

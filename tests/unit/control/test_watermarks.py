"""One contract, every ledger: how much may be in flight."""

import random

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.control import Lease, Watermarks
from tests.records import leased
from tests.unit.control.ledgers import SIZE, begin, commit, give_back, in_flight, lease


def marks(refs: int, low: int = 0) -> Watermarks:
    return Watermarks(high_bytes=1 << 40, high_refs=refs, low_bytes=1 << 39, low_refs=low)


def test_low_watermarks_must_be_lower():
    for low_refs, low_bytes in ((4, 1), (1, 40), (-1, 1)):
        with pytest.raises(UserError, match=r"the low watermark of -?\d+ \w+ is not below the high one of \d+: lower it"):
            Watermarks(high_refs=4, low_refs=low_refs, high_bytes=40, low_bytes=low_bytes)


@pytest.mark.parametrize("unit", ["refs", "bytes"])
def test_capture_pauses_above_the_high_mark_and_goes_on_at_the_low_one(ledger, unit):
    high = {"high_refs": 1 << 30, "low_refs": 1 << 29, "high_bytes": 1 << 30, "low_bytes": 1 << 29}
    bound = Watermarks(
        **high | {f"high_{unit}": 16 * (SIZE if unit == "bytes" else 1), f"low_{unit}": 8 * (10 if unit == "bytes" else 1)}
    )
    begin(ledger)
    for at in range(0, 16, 4):
        commit(ledger, found := lease(ledger, marks=bound))
        assert found.seqs[0] == at
    assert lease(ledger, marks=bound) is None
    assert lease(ledger, marks=bound) is None
    ledger.free(range(4))
    ledger.ack(4, 1)
    assert lease(ledger, marks=bound) is None  # below the high mark, not yet at the low one
    ledger.free(range(4, 8))
    ledger.ack(8, 2)
    assert lease(ledger, marks=bound).seqs[0] == 16
    assert ledger.status()["capture_waits"] == 1


def test_a_sample_that_fits_alone_waits_for_its_group(ledger):
    begin(ledger)
    assert lease(ledger, marks=marks(7, 1)).seqs == (0, 1, 2, 3)
    assert lease(ledger, marks=marks(7, 1)) is None


def test_the_window_that_the_trainer_waits_for_is_never_paused_and_others_stay_so(ledger):
    bound = marks(8, 1)
    begin(ledger, window=4)
    for _ in range(4):
        commit(ledger, lease(ledger, group=2, marks=bound))
    assert lease(ledger, group=2, marks=bound) is None
    ledger.free(range(7))
    ledger.ack(8, 2)  # the trainer waits for 8 to 11, and rank 1 is about to free seq 7
    ledger.free([7])
    assert lease(ledger, group=2, marks=marks(8, 0)).seqs == (8, 9)
    begin(ledger, window=4, published={seq: ("0-0", SIZE) for seq in range(8)}, frontier=8)
    assert lease(ledger, group=2, marks=bound) is None
    ledger.free(range(5))
    ledger.ack(6, 1)
    assert lease(ledger, group=2, marks=bound).seqs == (8, 9)  # awaited: 6 to 9
    assert lease(ledger, group=2, marks=bound) is None  # not awaited, and still above the low mark


def test_a_lost_window_that_is_awaited_goes_above_the_marks(ledger):
    known = {seq: ("0-0", SIZE) for seq in range(4, 16)}
    begin(ledger, published=known, wanted={seq: 1 for seq in range(4)}, frontier=16)
    assert in_flight(ledger) == (16, 120)
    found = lease(ledger, marks=marks(8, 2))
    assert (found.wanted, found.attempt) == ((0, 1, 2, 3), 1)
    assert in_flight(ledger) == (16, 160)
    assert lease(ledger, marks=marks(8, 2)) is None


def test_lost_samples_that_are_not_awaited_wait(ledger):
    begin(ledger, published={seq: ("0-0", SIZE) for seq in range(8)}, wanted={8: 1}, frontier=12)
    assert lease(ledger, marks=marks(8, 2)) is None
    ledger.ack(8, 2)
    assert lease(ledger, marks=marks(8, 2)).wanted == (8,)


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(6))
def test_a_random_walk_never_exceeds_the_marks_and_never_starves(ledger, seed):
    """Workers lease, commit, fail or vanish while a trainer takes windows: in flight is bounded, all is trained."""
    draw = random.Random(seed)
    window, group = draw.choice([(4, 4), (4, 1), (6, 4), (4, 8)])
    stop, high = 24 * window, max(window, group) + group + draw.randrange(12)
    bound = Watermarks(
        high_refs=high, low_refs=draw.randrange(high), high_bytes=high * 9, low_bytes=draw.randrange(high * 9)
    )
    size = [draw.randrange(1, 10) for _ in range(stop)]
    begin(ledger, stop=stop, window=window)
    held: list[Lease] = []
    published: set[int] = set()
    trained = idle = 0
    while trained < stop:
        action = draw.random()
        if action < 0.45:
            expiry = -1.0 if draw.random() < 0.2 else 60.0
            answer = ledger.lease(
                draw.choice("abc"), group=group, num_bytes=size.__getitem__, watermarks=bound, lease_s=expiry
            )
            found = leased(answer)
            held += [found] if found else []
        elif action < 0.8 and held:
            found = held.pop(draw.randrange(len(held)))
            accepted = set(commit(ledger, found, size))
            assert not published & accepted
            published |= accepted
        elif action < 0.85 and held:
            give_back(ledger, held.pop(), counts=False)
        elif published >= set(range(trained, trained + window)):
            ledger.free(range(trained, trained + window))
            trained += window
            ledger.ack(trained, trained // window)
            idle = 0
        refs, num_bytes = in_flight(ledger)
        assert refs <= bound.high_refs
        assert num_bytes <= bound.high_bytes
        idle += 1
        assert idle < 1000, "the awaited window starves"
    assert published >= set(range(stop))


def test_as_many_samples_as_anybody_may_have_in_flight(ledger):
    """A checkpoint frees thousands at once; a group of thousands is leased and committed."""
    begin(ledger, stop=60_000, published={seq: ("0-0123456789abcdef", SIZE) for seq in range(20_000)}, frontier=20_000)
    ledger.free(range(10_000))
    ledger.ack(20_000, 1, range(10_000, 20_000))
    assert in_flight(ledger) == (0, 0)
    found = lease(ledger, group=5_000)
    assert (found.seqs, found.wanted) == (tuple(range(20_000, 25_000)), tuple(range(20_000, 25_000)))
    assert commit(ledger, found) == list(found.wanted)
    assert in_flight(ledger) == (5_000, 5_000 * SIZE)

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.data import PassOrder, rank_slice
from lightning_dataflow.data.windows import accumulation


def test_every_pass_visits_every_sample_once_in_its_own_order():
    order = PassOrder(7, seed=3)
    passes = [[order.locate(seq) for seq in range(p * 7, (p + 1) * 7)] for p in range(3)]
    for number, one in enumerate(passes):
        assert sorted(index for index, _ in one) == list(range(7))
        assert {p for _, p in one} == {number}
    assert len({tuple(index for index, _ in one) for one in passes}) == 3


def test_the_order_depends_on_the_seed_alone():
    first = [PassOrder(50, seed=1).locate(seq) for seq in range(100)]
    assert first == [PassOrder(50, seed=1).locate(seq) for seq in range(100)]
    assert first != [PassOrder(50, seed=2).locate(seq) for seq in range(100)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_a_window_without_gap_or_overlap(world_size):
    seqs = [seq for rank in range(world_size) for seq in rank_slice(5, 8, rank, world_size)]
    assert seqs == list(range(40, 48))


def test_accumulation():
    assert accumulation(8, 2, 1) == 4
    assert accumulation(8, 2, 4) == 1
    with pytest.raises(UserError, match="not a multiple of micro_batch_size=3 × 1 ranks = 3: change one"):
        accumulation(8, 3, 1)
    with pytest.raises(UserError):
        accumulation(8, 0, 1)

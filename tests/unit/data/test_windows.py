import pytest
import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.data import Batching, PassOrder
from lightning_dataflow.data.windows import share_of


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
    seqs = [seq for rank in range(world_size) for seq in share_of(range(40, 48), rank, world_size)]
    assert seqs == list(range(40, 48))


def pack(lengths, start=0, **options):
    batching = Batching(**{"global_batch_size": 8, "row_tokens": 10, "rows_per_step": 2} | options)
    asked = []

    def num_tokens(seq):
        asked.append(seq)
        return lengths[seq]

    return batching.window(start, num_tokens), asked


def test_a_packed_window_fills_rows_in_order_and_ends_before_the_first_that_fits_nowhere():
    window, asked = pack([4, 5, 8, 1, 3, 1], start=0)
    assert window.rows == [[0, 1, 3], [2]]
    assert window.seqs == range(4)
    assert asked == [0, 1, 2, 3, 4]  # and nothing beyond, which might not be captured yet
    window, _ = pack([4, 5, 8, 1, 3, 1], start=4, global_batch_size=2)
    assert (window.seqs, window.rows) == (range(4, 6), [[4, 5], []])


def test_a_packed_window_holds_a_global_batch_at_most():
    window, asked = pack([1] * 9, global_batch_size=4)
    assert (window.seqs, window.rows, asked) == (range(4), [[0, 1, 2, 3], []], [0, 1, 2, 3])


def test_a_skipped_sample_takes_no_room():
    window, _ = pack([10, 10, 0, 0, 1])
    assert (window.seqs, window.rows) == (range(4), [[0, 2, 3], [1]])


def test_packed_windows_cover_all_seqs_and_leave_little_padding():
    generator = torch.Generator().manual_seed(0)
    # Conversations cut to 512 tokens: many short, a share at the cut.
    lengths = (torch.randn(5000, generator=generator) * 0.9 + 5.6).exp().int().clamp(20, 512).tolist()
    batching = Batching(global_batch_size=256, row_tokens=2048, rows_per_step=8)
    start, num_tokens, num_windows, seen = 0, 0, 0, []
    while start < 4500:
        window = batching.window(start, lengths.__getitem__)
        assert all(sum(lengths[seq] for seq in row) <= 2048 for row in window.rows)
        seen += sorted(seq for row in window.rows for seq in row)
        num_tokens += sum(lengths[seq] for seq in window.seqs)
        start, num_windows = window.seqs.stop, num_windows + 1
    assert seen == list(range(start))
    assert num_tokens / (num_windows * 8 * 2048) > 0.93


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_rows_of_a_window(world_size):
    window, _ = pack([6, 5, 6, 5, 4, 1, 9, 9], rows_per_step=4)
    shares = [share_of(window.rows, rank, world_size) for rank in range(world_size)]
    assert [row for share in shares for row in share] == window.rows
    assert {len(share) for share in shares} == {4 // world_size}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_per_step": None}, "row_tokens=10 and rows_per_step=None: packing needs both"),
        ({"row_tokens": None}, "row_tokens=None and rows_per_step=2: packing needs both"),
        ({"row_tokens": 7}, "row_tokens=7: a row holds 8 tokens or more"),
    ],
)
def test_packing_needs_both_sizes(options, message):
    with pytest.raises(UserError, match=message):
        pack([1], **options)


def test_a_sample_longer_than_a_row():
    with pytest.raises(UserError, match="the sample at seq 1 has 11 tokens, a row holds row_tokens=10: raise it, or cut"):
        pack([3, 11])


def test_accumulation():
    batching = Batching(global_batch_size=8, micro_batch_size=2)
    assert batching.accumulation(1) == 4
    assert batching.accumulation(4) == 1
    with pytest.raises(UserError, match="not a multiple of micro_batch_size=3 × 1 ranks = 3: change one"):
        Batching(global_batch_size=8, micro_batch_size=3).accumulation(1)
    with pytest.raises(UserError):
        Batching(global_batch_size=8, micro_batch_size=0).accumulation(1)
    packed = Batching(global_batch_size=7, micro_batch_size=2, row_tokens=64, rows_per_step=8)
    assert packed.accumulation(2) == 2
    with pytest.raises(UserError, match="rows_per_step=8 is not a multiple of micro_batch_size=2 × 3 ranks = 6"):
        packed.accumulation(3)

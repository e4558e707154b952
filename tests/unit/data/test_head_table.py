"""Heads of what is in flight."""

import random

import numpy as np
import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.control.heads import REF, RecordHead, heads_in, rows_of
from lightning_dataflow.data.head_table import MAX_AHEAD, HeadTable


def head(seq: int, number: int) -> RecordHead:
    return RecordHead(number, seq, 100 + seq, seq, 0, 0, REF)


def put(table: HeadTable, *heads: RecordHead) -> None:
    table.put(rows_of(heads))


def test_it_holds_what_a_dict_would():
    """Puts, marks and drops at random, beside a dict and a set."""
    draw = random.Random(3)
    table, known, marked, start = HeadTable(7), {}, set(), 7
    for number in range(1, 400):
        seqs = draw.sample(range(start, start + 40), 3)
        heads = [head(seq, number * 10 + index) for index, seq in enumerate(seqs)]
        assert table.has_none_of(np.array(seqs)) == known.keys().isdisjoint(seqs)
        put(table, *heads)
        known |= {one.seq: one for one in heads}
        marked -= set(seqs)
        wanted = range(start + draw.randrange(20), start + 20 + draw.randrange(30))
        assert table.missing(wanted).tolist() == [seq for seq in wanted if seq not in known]
        assert [table.get(seq) for seq in wanted] == [known.get(seq) for seq in wanted]
        there = sorted(known)
        assert heads_in(table.pick(there)) == heads_in(table.all_rows()) == [known[seq] for seq in there]
        run = range(there[0], next(seq for seq in range(there[0], there[0] + 80) if seq not in known))
        assert heads_in(table.rows(run)) == [known[seq] for seq in run]
        table.mark(run)
        marked |= set(run)
        if number % 5 == 0:
            start += draw.randrange(8)
            dropped = [seq for seq in there if seq < start]
            assert heads_in(table.drop(start)) == [known[seq] for seq in dropped if seq not in marked]
            known = {seq: one for seq, one in known.items() if seq >= start}
        assert table.start == start
    assert table.drop(start - 1).size == 0
    assert table.start == start


def test_a_seq_before_its_start_or_twice_is_not_new():
    table = HeadTable(4)
    assert table.has_none_of(np.array([4, 6, 5]))
    assert not table.has_none_of(np.array([3, 4]))
    assert not table.has_none_of(np.array([5, 5]))
    assert table.get(3) is None


def test_a_seq_that_no_log_can_hold_takes_no_memory():
    table = HeadTable(0)
    put(table, head(1, 1))
    with pytest.raises(
        UserError, match=f"the log holds seq {MAX_AHEAD + 1}, over {MAX_AHEAD} after seq 0, where this trainer begins"
    ):
        put(table, head(MAX_AHEAD + 1, 2))
    assert table.missing(range(3)).tolist() == [0, 2]

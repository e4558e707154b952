"""A producer that outruns the trainer: everything stays bounded, nothing is lost, nothing stays."""

import pytest

from tests.system.soak import GROUP, MARKS, SEGMENT_BYTES, WINDOW, soak

pytestmark = pytest.mark.slow

NUM_SAMPLES = 2000
MAX_GROWTH_KB = 24 << 10
MAX_LEDGER_BYTES = 6 << 20
"""SQLite starts its write-ahead log over at 1,000 pages of 4 kB."""


@pytest.mark.nightly
def test_a_producer_that_outruns_the_trainer(tmp_path):
    report = soak(tmp_path, NUM_SAMPLES, step_s=0.02)
    assert report.trained == [list(range(at, at + WINDOW)) for at in range(0, NUM_SAMPLES, WINDOW)]
    assert MARKS.high_refs - GROUP <= report.most_refs <= MARKS.high_refs
    assert report.most_bytes <= MARKS.high_bytes
    assert report.capture_waits > 3
    assert report.left_in_store == 0
    for memory in (report.producer_kb, report.trainer_kb):
        assert max(memory) - memory[len(memory) // 3] < MAX_GROWTH_KB
    assert max(report.file_bytes) < MAX_LEDGER_BYTES + 10 * SEGMENT_BYTES

"""Packed rows through every topology."""

import pytest

from tests.processes import TINY, TRAIN, nightly, python, result

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, MOST = 4, 16
PACKED = ("data.row_tokens=320", "data.rows_per_step=4", f"data.global_batch_size={MOST}", f"trainer.max_steps={STEPS}")
TWO_RANKS = ("trainer=ddp", "trainer.devices=2")


def run(folder, strategy, topology, *more):
    """The result of a packed run."""
    arguments = [f"strategy={strategy}" if one.startswith("strategy=") else one for one in TINY]
    if topology.startswith("disagg"):
        arguments.append("store.capacity_bytes=64000000")
    name = f"{strategy}-{topology}-{len(more)}"
    python(TRAIN, *arguments, *PACKED, f"topology={topology}", f"run_name={name}", *more, cwd=folder)
    return result(folder, name)


@pytest.mark.parametrize(
    ("strategy", "topologies"),
    [
        ("eagle3", ("disagg_offline",)),
        nightly("eagle3", ("interleaved",)),
        nightly("dflash", ("disagg_online",)),
        nightly("domino", ("disagg_online",)),
    ],
)
def test_packed_steps_are_the_same_in_every_topology_and_on_two_ranks(tmp_path, strategy, topologies):
    online = run(tmp_path, strategy, "online")
    assert STEPS * 4 < online["samples_trained"] < STEPS * MOST  # the lengths close the windows
    assert online["throughput"]["padding_fraction"] < 0.25
    for topology in topologies:
        actual = run(tmp_path, strategy, topology)
        assert actual["losses"] == online["losses"], topology
        assert actual["samples_trained"] == online["samples_trained"], topology
    two = run(tmp_path, strategy, "disagg_online", *TWO_RANKS)
    assert two["losses"] == pytest.approx(online["losses"], rel=1e-4)
    assert two["samples_trained"] == online["samples_trained"]


def test_interleaved_on_two_ranks_refuses(tmp_path):
    arguments = (*TINY, *PACKED, "topology=interleaved", *TWO_RANKS)
    shown = python(TRAIN, *arguments, cwd=tmp_path, status=1)
    assert "error: each of the 2 ranks captures its own slice of a window here, so samples cannot be packed" in shown.stderr

"""`target.engine=sglang`: a server for one process alone. A stand-in plays SGLang; sglang/ has the real one."""

import pytest

from lightning_dataflow.run.target import SHARED_MEMORY
from tests.processes import ROOT, TINY, TRAIN, nightly, processes_in, python, result, slow, wait_until

STAND_IN = {"PYTHONPATH": f"{ROOT}/tests/sglang/stand_in:{ROOT}"}
TOPOLOGIES = {
    "online": (),
    "interleaved": (),
    "offline": (),
    "disagg_online": ("store=shared_dir",),
}


@pytest.mark.parametrize("topology", [nightly("online"), slow("disagg_online"), nightly("interleaved"), nightly("offline")])
def test_the_losses_are_those_of_hf_and_nothing_is_left(tmp_path, topology):
    settings = (f"topology={topology}", *TOPOLOGIES[topology], "trainer.max_steps=4")
    python(TRAIN, *TINY, *settings, "run_name=hf", cwd=tmp_path)
    others = set(SHARED_MEMORY.glob("lightning-dataflow-*"))
    python(TRAIN, *TINY, *settings, "run_name=sglang", "target.engine=sglang", cwd=tmp_path, variables=STAND_IN)
    actual, expected = result(tmp_path, "sglang"), result(tmp_path, "hf")
    assert actual["losses"] == expected["losses"] and actual["samples_skipped"] == 0
    assert set(SHARED_MEMORY.glob("lightning-dataflow-*")) <= others, "the folder that features passed through is gone"
    wait_until(lambda: not processes_in(tmp_path), 10, lambda: f"processes left: {processes_in(tmp_path)}")


@pytest.mark.slow
def test_the_conformance_command(tmp_path):
    shown = python(
        *("-m", "lightning_dataflow", "conformance", "experiment=tiny", "strategy=dflash", "target.engine=sglang"),
        cwd=tmp_path,
        variables=STAND_IN,
    ).stdout.splitlines()
    assert [line.rpartition("  ")[2] for line in shown[-12:]] == ["the same"] * 12

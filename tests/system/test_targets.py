"""Targets of other architectures through the commands: captured, trained on, decoded with and exported."""

import json

import pytest

from tests.processes import TINY, TRAIN, nightly, python, result, slow
from tests.targets import write_target

MODULE = ("-m", "lightning_dataflow")


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("gpt_oss", "eagle3"),
        slow("qwen2_5_vl", "dflash"),
        slow("gemma2", "dflash"),
        slow("phi", "eagle3"),
        nightly("bloom", "eagle3"),
        nightly("granite", "domino"),
        nightly("cohere", "eagle3"),
        nightly("yarn", "dflash"),
    ],
)
def test_a_run(tmp_path, name, strategy):
    settings = (f"target.path={write_target(name, tmp_path / 'target')}", "target=hf", f"strategy={strategy}")
    python(TRAIN, *TINY, *settings, "trainer.max_steps=3", "evaluate.batch_size=1", "run_name=run", cwd=tmp_path)
    assert len(result(tmp_path, "run")["losses"]) == 3
    python(*MODULE, "export", "runs/run", "--engine", "sglang", "--out", "draft", cwd=tmp_path)
    rope = json.loads((tmp_path / "draft/config.json").read_text())["rope_parameters"]
    assert rope["rope_type"] == ("yarn" if name in ("yarn", "gpt_oss") else "default")


def test_a_bias_that_engines_leave_out(tmp_path):
    settings = (f"target.path={write_target('phi', tmp_path / 'target')}", "target=hf", "strategy=dflash")
    python(TRAIN, *TINY, *settings, "trainer.max_steps=1", "run_name=run", "callbacks=no_evaluation", cwd=tmp_path)
    ended = python(*MODULE, "export", "runs/run", "--engine", "vllm", "--out", "draft", cwd=tmp_path, status=1)
    assert "has a bias, which vLLM leaves out" in ended.stderr and "Traceback" not in ended.stderr

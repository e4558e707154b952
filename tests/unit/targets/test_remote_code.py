"""Code in a target's folder runs only where the process was told to trust it."""

import json
import shutil
from pathlib import Path

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.targets import HFTargetEngine, info, load_tokenizer, read_target_info
from lightning_dataflow.targets.info import read_eos_token_ids, tensor_names, trust_remote_code

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({mark!r}).touch()

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_target(target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target whose classes are in its folder; their code leaves the file `ran` behind."""
    monkeypatch.setattr(info, "_trusted", set())
    folder = tmp_path / "own_target"
    shutil.copytree(target_path, folder)
    mark = str(tmp_path / "ran")
    (folder / "own.py").write_text(CODE.format(mark=mark))
    (folder / "own_tokens.py").write_text(TOKENIZER.format(mark=mark))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    _change(folder / "config.json", model_type="own", auto_map=classes)
    _change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own_tokens.OwnTokenizer"]},
    )
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("load", [read_target_info, HFTargetEngine, read_eos_token_ids, tensor_names, load_tokenizer])
def test_nothing_runs_unless_it_is_trusted(own_target, tmp_path, monkeypatch, load):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    try:
        load(own_target)
    except UserError as error:
        assert "it needs code of its own, which is not run (target.trust_remote_code=false)" in str(error)
        assert "True" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_trust_is_the_process_s(own_target, tmp_path):
    with pytest.raises(UserError, match="which is not run"):
        read_target_info(own_target)
    trust_remote_code(own_target)
    assert read_target_info(own_target).num_layers == 8
    assert (tmp_path / "ran").exists()
    assert type(HFTargetEngine(own_target, dtype="float32", device="cpu").model).__name__ == "OwnModel"
    assert read_eos_token_ids(own_target)
    assert load_tokenizer(own_target).is_fast

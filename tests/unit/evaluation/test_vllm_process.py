"""The process in which vLLM would run, where it does not."""

import os
import stat
import sys

import pytest

from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.evaluation.acceptance import Decoding
from lightning_dataflow.evaluation.judges.vllm_process import VLLMDecoder, find_python
from lightning_dataflow.evaluation.judges.vllm_worker import rounds


def decoder(folder, **options):
    defaults = {"python": sys.executable, "target": "nowhere", "dtype": "float32", "folder": folder}
    return VLLMDecoder(**{**defaults, "decoding": Decoding(max_new_tokens=4), "stop_token_ids": (), **options})


def script(folder, text):
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "set evaluate.python"),
        ("nowhere/python", "evaluate.python=nowhere/python does not run"),
        ("/", "evaluate.python=/ does not run"),
        (sys.executable, "has no vLLM: install it there"),
    ],
)
def test_a_python_without_vllm(path, message):
    with pytest.raises(UserError, match=message):
        find_python(path)


def test_the_program_that_was_asked_is_the_one_that_runs(tmp_path, monkeypatch):
    """A bare name is a file of the current folder, as the message of a missing one says, and none of PATH."""
    path = script(tmp_path, "exit 0")
    monkeypatch.chdir(tmp_path)
    assert find_python("python") == path
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match="python=python does not run"):
        find_python("python")


def test_an_error_is_one_line_and_its_log_is_named(tmp_path):
    with pytest.raises(UserError, match=r"vLLM: ModuleNotFoundError: No module named 'vllm' \(see .*vllm-plain.log\)"):
        decoder(tmp_path).decode([[1]])
    assert "Traceback" in (tmp_path / "vllm-plain.log").read_text()


@pytest.mark.integration
def test_a_process_that_dies_or_takes_too_long(tmp_path):
    with pytest.raises(PeerFailedError, match=r"vLLM ended with status 7 and no result: see .*vllm-plain.log"):
        decoder(tmp_path, python=script(tmp_path, "exit 7")).decode([[1]])
    sleeper = script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    with pytest.raises(PeerTimeoutError, match=r"within 1 s: see .*, or raise evaluate.timeout_s"):
        decoder(tmp_path, python=sleeper, timeout_s=1.0).decode([[1]])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_settings_are_checked_before_it_starts(tmp_path):
    with pytest.raises(UserError, match=r"evaluate.temperature=0.005: vLLM would decode at 0.01, use that or more, or 0"):
        decoder(tmp_path, decoding=Decoding(max_new_tokens=4, temperature=0.005))


def test_prompts_of_one_token_never_join_while_others_decode():
    assert rounds([3, 1, 7, 1, 1, 2], 2) == [[1, 3], [4], [0, 2, 5]]
    assert rounds([1, 1], 2) == [[0, 1]]
    assert rounds([4, 2, 9], 1) == [[0, 1, 2]]

"""What keeps a key out of logs."""

import ast
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment

SCRIPT = """
import logging
from lightning_dataflow.sglang_plugin.launch import hide
hide("the'key\\\\")
logging.basicConfig(level="INFO", format="%(message)s")
log = logging.getLogger("any")
log.info("%s", {"api_key": "the'key\\\\", "port": 1})
log.info("api_key=the'key\\\\ port=%d", 1)
log.info("port=%d", 2)
log.info("no arguments for %d")
"""


def test_a_key_is_hidden_in_whatever_is_logged():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    first, second, third, *_ = run.stderr.splitlines()
    assert "the" not in first and "***" in first and "'port': 1" in first
    assert second == "api_key=*** port=1"
    assert third == "port=2"


SERVER = """
import sys
from pathlib import Path
print(sys.argv[1:])
print(Path("/proc/self/cmdline").read_text().split(chr(0)))
"""


@pytest.fixture
def launch(tmp_path):
    """Starts it by hand, with a stand-in for SGLang that shows what it was started with."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "launch_server.py").write_text(SERVER)
    variables = {**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def run(text: bytes) -> subprocess.CompletedProcess[str]:
        (tmp_path / "key.txt").write_bytes(text)
        command = f"{sys.executable} -m lightning_dataflow.sglang_plugin.launch --port 30000 < key.txt"
        return subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.mark.parametrize("text", [b"the'key", b"the'key\n", b"the'key\r\n", b" the'key \nmore\n"])
def test_the_server_gets_the_key_that_its_command_line_does_not_show(launch, text):
    """White space is dropped, as the client drops it."""
    given, shown = map(ast.literal_eval, launch(text).stdout.splitlines())
    assert given == ["--port", "30000", "--api-key=the'key"]
    assert shown[1:] == ["-m", "lightning_dataflow.sglang_plugin.launch", "--port", "30000", ""]


@pytest.mark.parametrize("text", [b"", b"\n", b"\nthe key\n", b"a\x07b\n"])
def test_no_server_starts_without_a_key(launch, text):
    run = launch(text)
    assert (run.returncode, run.stdout) == (1, "")
    assert "no API key on standard input: add `< key.txt`" in run.stderr and "Traceback" not in run.stderr

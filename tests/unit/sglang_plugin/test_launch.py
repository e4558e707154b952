"""What keeps a key out of logs."""

import subprocess
import sys

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

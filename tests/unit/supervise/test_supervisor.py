"""What the supervisor adds to the trainer's result."""

import json
import time

import pytest

from lightning_dataflow.callbacks.result import write_result
from lightning_dataflow.contracts import PeerFailedError
from lightning_dataflow.supervise.supervisor import _complete_result
from lightning_dataflow.supervise.watch import Restarts


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        ("interrupted", PeerFailedError("producer-0: no target"), "failed: producer-0: no target"),
        ("completed", PeerFailedError("the store ended with status 1"), "completed"),
        ("interrupted", KeyboardInterrupt(), "interrupted"),
        ("completed", None, "completed"),
    ],
)
def test_the_reason_of_a_failed_run_is_in_its_result(tmp_path, status, error, expected):
    """The supervisor interrupts the trainer when another process failed; only the supervisor knows why."""
    path, restarts = tmp_path / "result.json", Restarts(2)
    since = time.time() - 1
    write_result(path, {"status": status, "losses": [1.5]})
    _complete_result(path, restarts, since, type(error), error, None)
    assert json.loads(path.read_text()) == {"status": expected, "losses": [1.5], "restarts": {}}
    _complete_result(path, restarts, time.time() + 60, PeerFailedError, PeerFailedError("later"), None)
    assert json.loads(path.read_text())["status"] == expected, "a result of an earlier run stays as it is"

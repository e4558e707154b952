"""`result.json`, whatever a user's settings are made of."""

import json
from collections import namedtuple
from types import MappingProxyType

import numpy as np
import pytest
from omegaconf import OmegaConf

from lightning_dataflow.callbacks import ResultWriter
from lightning_dataflow.callbacks.result import write_result

Betas = namedtuple("Betas", ("first", "second"))


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.float64(0.5), 0.5),
        (np.float64("nan"), None),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (Betas(0.9, np.float64(0.5)), [0.9, 0.5]),
        (MappingProxyType({"a": (1,)}), {"a": [1]}),
        (OmegaConf.create({"a": [1, 2]}), {"a": [1, 2]}),
        (np.dtype("float32"), "float32"),
        ({1: 2}, {"1": 2}),
    ],
)
def test_settings_of_other_types(tmp_path, value, written):
    write_result(tmp_path / "result.json", {"settings": {"it": value}})
    assert json.loads((tmp_path / "result.json").read_text()) == {"settings": {"it": written}}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TypeError("Integer exceeds 64-bit range")])
def test_a_result_that_cannot_be_written_hides_no_other_error(monkeypatch, caplog, error):
    def fail(*arguments):
        raise error

    writer = ResultWriter()
    monkeypatch.setattr(writer, "_write", fail)
    writer.on_exception(None, None, RuntimeError("the cause"))
    assert f"no result was written: {error}" in caplog.text

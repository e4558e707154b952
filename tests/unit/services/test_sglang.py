"""The SGLang server that a run starts; tests/system/sglang starts a real one."""

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.services.sglang import LocalSGLang


@pytest.mark.parametrize("argument", ["--api-key", "--api-key=the", "--admin-api-key"])
def test_a_key_among_a_servers_arguments(tmp_path, argument):
    with pytest.raises(UserError, match=r"hold an API key.*set target\.api_key_file"):
        LocalSGLang("m", (1,), python="python3", store={}, folder=tmp_path, arguments=[argument, "the key"])
    assert list(tmp_path.iterdir()) == []

"""SGLang servers whose store is a Mooncake."""

from contextlib import contextmanager

import pytest

from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.services.sglang import LocalSGLang
from tests.conftest import LAYER_IDS
from tests.sglang.environment import ARGUMENTS, VARIABLES, sglang_python

KEY = "the'key"


@pytest.fixture(scope="module", autouse=True)
def variables():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def mooncake(tmp_path_factory):
    with LocalMooncake(capacity_bytes=64 << 20, log_dir=tmp_path_factory.mktemp("mooncake")) as running:
        yield running


@pytest.fixture(scope="module")
def start(target_path, tmp_path_factory, mooncake):
    """Starts a server whose store is `mooncake`."""

    @contextmanager
    def run(*arguments: str, layer_ids=LAYER_IDS, store=None):
        """The key of all of them is KEY."""
        server = LocalSGLang(
            target_path,
            layer_ids,
            python=str(sglang_python()),
            store=store
            or {"store": "mooncake", "address": mooncake.master_address, "client_address": mooncake.client_address},
            folder=tmp_path_factory.mktemp("server"),
            api_key=KEY,
            arguments=[*ARGUMENTS, "--context-length", "512", *arguments],
        )
        try:
            yield server
        finally:
            server.close()

    return run

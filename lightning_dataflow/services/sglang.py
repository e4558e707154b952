"""An SGLang server that captures features for one run."""

import json
import os
import re
import secrets
import shutil
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.waiting import LONGEST_CALL_S
from lightning_dataflow.services.server import HOST, LocalServer, open_private
from lightning_dataflow.sglang_plugin.wire import SERVER_FILE, server_command

LAUNCHER = "lightning_dataflow.sglang_plugin.launch"
START_TIMEOUT_S = 900.0
HEALTH_TIMEOUT_S = LONGEST_CALL_S
"""Of a longer call the wait for the start would count only so much, so that a server that hangs is waited for too long."""


class LocalSGLang(LocalServer):
    """Runs one SGLang server.

    Args:
        python: of the environment that SGLang and this package are installed in.
        store: what the server's settings file says; see ServerStores.
        api_key: requests need it; a random one where None.
        folder: for the server's settings file and its log.
        arguments: further flags of the server.

    Attributes:
        api_key: known to this process and the server only; in no file, command line or log.

    Raises:
        UserError: the server did not start, or `arguments` hold a key.
    """

    name = "the SGLang server"
    stop_timeout_s = 3.0

    def __init__(
        self,
        path: str | Path,
        layer_ids: Sequence[int],
        *,
        python: str,
        store: Mapping[str, Any],
        folder: str | Path,
        api_key: str | None = None,
        arguments: Sequence[str] = (),
    ):
        if shutil.which(python) is None:
            raise UserError(f"target.server_python={python} is no program: name the Python of SGLang's environment")
        if any(re.match(r"--(admin-)?api", argument) for argument in arguments):
            raise UserError("target.server_args hold an API key, which the log would show: set target.api_key_file instead")
        super().__init__(Path(folder) / "sglang.log")
        self.api_key = api_key or secrets.token_hex(16)
        self.url = f"http://{self.address}"
        self._command = server_command(str(Path(path).absolute()), layer_ids, python=python, module=LAUNCHER)
        self._command += ["--host", HOST, "--port", str(self.port), *arguments]
        settings = self.log_path.with_name("sglang_server.json")
        with open_private(settings, "w") as file:
            json.dump(dict(store), file)
        self.environment = os.environ | {SERVER_FILE: str(settings.absolute())}
        try:
            self.start(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def command(self) -> list[str]:
        return self._command

    def standard_input(self) -> str:
        return f"{self.api_key}\n"

    def is_ready(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not reach this machine
        return opener.open(f"{self.url}/health", timeout=HEALTH_TIMEOUT_S).status == 200

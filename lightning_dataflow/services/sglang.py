"""A capture server of our own on this machine."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.services.leash import leashed_command
from lightning_dataflow.sglang_plugin.wire import SERVER_FILE, server_command

HOST = "127.0.0.1"
POLL_S = 0.2
STOP_S = 3.0
LAUNCHER = "lightning_dataflow.sglang_plugin.launch"


class LocalSGLang:
    """Runs one SGLang server, which dies with this process: start it from a thread that lives as long as it should.

    Args:
        python: of the environment that SGLang and this package are installed in.
        store: what the server's file says; see ServerStores.
        api_key: who has it may ask the server; a random one where None.
        folder: for the server's file and its log.
        arguments: further flags of the server.

    Attributes:
        api_key: in this process and the server's, in no file, command line or log.

    Raises:
        UserError: it did not start; names its log and repeats its last error. Or `arguments` hold a key.
    """

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
        start_timeout_s: float = 900.0,
    ):
        if shutil.which(python) is None:
            raise UserError(f"target.server_python={python} is no program: name the Python of SGLang's environment")
        if any(re.match(r"--(admin-)?api", argument) for argument in arguments):
            raise UserError("target.server_args hold an API key, which the log would show: set target.api_key_file instead")
        self.api_key = api_key or secrets.token_hex(16)
        self.log_path = Path(folder) / "sglang.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        settings = self.log_path.with_name("sglang_server.json")
        settings.unlink(missing_ok=True)
        with os.fdopen(os.open(settings, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(dict(store), file)
        port = _free_port()
        self.url = f"http://{HOST}:{port}"
        command = [
            *server_command(str(Path(path).absolute()), layer_ids, python=python, module=LAUNCHER),
            *("--host", HOST, "--port", str(port)),
            *arguments,
        ]
        try:
            with os.fdopen(os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as log:
                os.fchmod(log.fileno(), 0o600)  # it may be there already
                self._process = subprocess.Popen(
                    leashed_command(command, signal.SIGKILL),  # on SIGTERM it would first serve what is asked for
                    env={**os.environ, SERVER_FILE: str(settings.absolute())},
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            assert self._process.stdin is not None, "a pipe"
            with suppress(BrokenPipeError), self._process.stdin as stdin:  # it may have ended: _wait says so
                stdin.write(f"{self.api_key}\n".encode())
            self._wait(time.monotonic() + start_timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it and all its processes. Does nothing the second time."""
        if not hasattr(self, "_process"):
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)

    def _wait(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise UserError(f"the SGLang server ended with status {status}, see {self.log_path}: {self._last_error()}")
            with suppress(OSError, urllib.error.URLError):
                opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                if opener.open(f"{self.url}/health", timeout=10).status == 200:
                    return
            time.sleep(POLL_S)
        raise UserError(f"the SGLang server did not start in time, see {self.log_path}: {self._last_error()}")

    def _last_error(self) -> str:
        lines = [line.strip() for line in self.log_path.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return (errors or lines or ["it wrote nothing"])[-1][:300]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]

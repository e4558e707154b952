"""What all servers that a run starts have in common, shown with a server of a few lines."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.services.server import HOST, LocalServer, start_together

LISTENS = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    server.accept()
"""
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
print(os.getpid(), flush=True)
time.sleep(60)
"""


class Server(LocalServer):
    name = "example"
    stop_timeout_s = 0.5

    def __init__(self, log_path: Path, code: str = LISTENS):
        self.code = code
        super().__init__(log_path)

    def command(self) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", self.code, str(self.port)]

    def is_ready(self) -> bool:
        socket.create_connection((HOST, self.port)).close()
        return True


def is_running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_it_starts_again_at_its_port_and_ends(tmp_path):
    with Server(tmp_path / "logs" / "example.log") as server:
        server.start()
        assert server.log_path.stat().st_mode & 0o777 == 0o600
        port, pid = server.port, server.process.pid
        server.process.kill()
        assert server.process.wait() == -9
        server.start()
        assert server.port == port and server.process.pid != pid and server.poll() is None
    assert server.poll() is not None
    server.close()


def test_a_taken_port_is_replaced(tmp_path):
    with socket.create_server((HOST, 0)) as other, Server(tmp_path / "log") as server:
        server.port = taken = other.getsockname()[1]
        server.is_ready = lambda: server.port != taken and Server.is_ready(server)
        start_together([server], 10.0)
        assert server.port != taken


def test_the_last_error_of_this_start_is_in_the_message(tmp_path):
    path = tmp_path / "log"
    path.write_text("ValueError: of an earlier start\n")
    lines = "print('loading'); print('RuntimeError: no memory'); print('bye'); raise SystemExit(3)"
    with pytest.raises(UserError, match=rf"^example ended with status 3, see {path}: RuntimeError: no memory$"):
        Server(path, lines).start()
    with pytest.raises(UserError, match=rf"^example ended with status 0, see {path}: one \| two$"):
        Server(path, "print('one'); print(); print('two')").start()
    os.truncate(path, 1 << 40)  # it is not read whole
    with pytest.raises(UserError, match=rf"^example ended with status 0, see {path}: one$"):
        Server(path, "print('one')").start()
    with pytest.raises(UserError, match=rf"^example ended with status 0, see {path}: c \| c \| c \| c$"):
        Server(path, "print('KeyError: a'); print('b' * (1 << 20)); print('c\\n' * 5)").start()


@pytest.mark.integration
def test_a_server_that_is_never_ready_is_named_and_ended(tmp_path):
    """It ignores SIGTERM, and so does the process that it has started."""
    server = Server(tmp_path / "log", STUBBORN)
    with pytest.raises(UserError, match=r"^example was not ready within 0.5 s, see .*: \d+ \| \d+$"):
        server.start(timeout_s=0.5)
    server.close()
    pids = server.log_path.read_text().split()
    assert len(pids) == 2
    deadline = time.monotonic() + 5.0
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_waits_for_the_one_it_needs(tmp_path):
    first, second = Server(tmp_path / "first", "raise SystemExit(5)"), Server(tmp_path / "second", STUBBORN)
    second.needs = first
    with pytest.raises(UserError, match=r"^example ended with status 5"):
        first.start()
    with second, pytest.raises(UserError, match=rf"^example ended with status 5, see {tmp_path}/first"):
        second.start()

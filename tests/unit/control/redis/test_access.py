"""A Redis that does not let us in, or is none."""

import os
import shutil
import socket
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.control.redis import server as redis_server
from lightning_dataflow.control.redis.address import RedisAddress
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.server import RedisServer
from tests.unit.control.redis.calls import refs, seqs

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: apt-get install redis-server)"
)


def test_the_wrong_password_and_a_user_that_may_not(own):
    server = own("user small on >right ~ldf:* -@all +@connection +info")
    for wrong in (None, "wrong"):
        with pytest.raises(PermissionError, match=r"refuses this user \(.*\): check channel.username and the pass"):
            RedisServer(replace(server.where, password=wrong), "run")
    with pytest.raises(PermissionError, match=r"refuses this user .*docs/redis.md lists what"):
        RedisChannel(RedisServer(replace(server.where, username="small", password="right"), "run"))
    assert "right" not in repr(replace(server.where, password="right"))


def test_an_address_without_a_redis():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]

        def answer() -> None:
            connection, _ = silent.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match=rf"no Redis answers at 127.0.0.1:{port} \(.*\): start one there, or correct"):
            RedisServer(RedisAddress(address=f"127.0.0.1:{port}"), "run")
    with pytest.raises(UserError, match=rf"no Redis answers at 127.0.0.1:{port} \(.*refused.*\): start one there"):
        RedisServer(RedisAddress(address=f"127.0.0.1:{port}"), "run")
    for wrong in ("localhost", ":1", "a:b"):
        with pytest.raises(UserError, match=f"channel.address={wrong} is no host:port: give both"):
            RedisServer(RedisAddress(address=wrong), "run")


def test_a_redis_that_is_too_old_or_evicts(own, tmp_path, monkeypatch):
    server = own()
    RedisServer(server.where, "run").ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(UserError, match=r"drops keys when .* \(maxmemory-policy allkeys-lru\).* set maxmemory-policy noev"):
        RedisServer(server.where, "run")
    program = Path(shutil.which("redis-server"))
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.split("v=")[1].split()[0]
    older = tmp_path / "redis-server"  # the same, but that it says another version
    older.write_bytes(program.read_bytes().replace(version.encode() + b"\0", ("5" + version[1:]).encode() + b"\0"))
    older.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(redis_server, "OLDEST", (5, 0))
    old = own()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"Redis at .* has version 5\.\S+, needed is 7\.0 or newer: upgrade it"):
        RedisServer(old.where, "run")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls(own, tmp_path):
    name = ("-subj", "/CN=ldf", "-addext", "subjectAltName=IP:127.0.0.1", "-nodes", "-newkey", "rsa:2048", "-days", "2")
    for one in ("server", "other"):
        openssl(tmp_path, "req", "-x509", *name, "-keyout", f"{one}.key", "-out", f"{one}.crt")
    certificate, key = str(tmp_path / "server.crt"), str(tmp_path / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = own(
        f"tls-port {port}", f"tls-cert-file {certificate}", f"tls-key-file {key}", f"tls-ca-cert-file {certificate}"
    )
    where = replace(
        server.where, address=f"127.0.0.1:{port}", tls=True, ca_file=certificate, cert_file=certificate, key_file=key
    )
    log = RedisChannel(RedisServer(where, "run"))
    log.announce({"run_id": "run"})
    log.publish(refs(0))
    assert seqs(log) == [0]
    wrong = (
        replace(where, tls=False),
        replace(server.where, tls=True),
        replace(where, ca_file=str(tmp_path / "other.crt")),
        replace(where, cert_file=None, key_file=None),
    )
    for one in wrong:
        with pytest.raises(UserError, match=r"no Redis answers at .* or correct channel.address or channel.tls "):
            RedisServer(one, "run")
    with pytest.raises(UserError, match=r"channel.ca_file=nowhere: there is no such file"):
        RedisServer(replace(where, ca_file="nowhere"), "run")

"""A connection to Mooncake: its return codes as exceptions, and bounded waits for peers that are gone."""

import json
import os
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning_dataflow.contracts import UserError
from lightning_dataflow.stores.mooncake.buffers import PageAllocator, RegisteredMemory

T = TypeVar("T")

NO_SPACE, REFUSED, LEASE_EXPIRED, OWNER_GONE = -200, -600, -707, -800
UNREACHABLE = (-1, -900, -901)
NOT_FOUND = -704
"""To a put: the master threw away what was half written, for it took longer than `--put_start_discard_timeout_sec`."""
PUT_TRIES = 3
PROBE_TIMEOUT_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5

# The Mooncake library reads these from the environment when a client is made; what is set already wins. Kept connections
# and slices of 1 MB move 64 MB tensors 1.1 to 1.4 times as fast as its defaults.
TRANSFER_SETTINGS = {"MC_TCP_ENABLE_CONNECTION_POOL": "1", "MC_TCP_SLICE_SIZE": str(1 << 20)}
# Its remarks would mix with our output.
LOG_SETTINGS = {"MC_LOG_LEVEL": "ERROR"}

INSTALL = (
    "pip install 'lightning-dataflow[mooncake]' (with an NVIDIA GPU: [mooncake-cuda]); "
    "Debian packages: libibverbs1 librdmacm1 libnuma1"
)


class StoreUnavailableError(ConnectionError):
    """Mooncake did not answer for as long as we wait. The message names the address and the remedy."""


class OwnerGoneError(StoreUnavailableError):
    """The storage process that holds, or should hold, an object is gone."""


class TransientError(Exception):
    """A peer is gone and may come back; `MooncakeClient.retry` waits for it."""

    def __init__(self, code: int):
        super().__init__(f"Mooncake answered {code}")
        self.code = code


class MooncakeClient:
    """One connection, shared by all threads of a process.

    Args:
        master_address: host:port of the master.
        client_address: host:port of a `mooncake_client` on this machine: bytes move through shared memory. None: this
            process transfers by itself with `protocol`.
        staging_bytes: memory inside Mooncake for `put_bytes` and `get_bytes`; the largest value that they can move.

    Raises:
        UserError: the package is missing, or nothing listens at an address.
    """

    def __init__(
        self,
        *,
        master_address: str,
        client_address: str | None,
        protocol: str = "tcp",
        rdma_devices: str = "",
        local_hostname: str = "127.0.0.1",
        staging_bytes: int = 0,
        owner_timeout_s: float = 15.0,
        unavailable_timeout_s: float = 20.0,
    ):
        self.master_address, self.client_address = master_address, client_address
        self.owner_timeout_s, self.unavailable_timeout_s = owner_timeout_s, unavailable_timeout_s
        mooncake = import_mooncake()
        # Setup itself would block for 90 s when nobody is there.
        check_listening(master_address, "Mooncake master", "start mooncake_master there, or correct store.address")
        self._store = mooncake.MooncakeDistributedStore()
        self._pinned = mooncake.ReplicateConfig()
        self._pinned.with_hard_pin = True  # never evicted: a full store refuses instead of losing samples
        if client_address is None:
            code = self._store.setup(
                local_hostname, "P2PHANDSHAKE", 0, staging_bytes, protocol, rdma_devices, master_address
            )
            allocator: Any = PageAllocator()
        else:
            check_listening(
                client_address, "mooncake_client", "start it on this machine, or leave out store.client_address"
            )
            code = self._store.setup_dummy(0, staging_bytes, client_address)
            allocator = mooncake.MooncakeHostMemAllocator()
        if code:
            peer = client_address or master_address
            raise UserError(f"Mooncake at {peer} refused this process (code {code}): see the logs of Mooncake there")
        self.memory = RegisteredMemory(allocator.alloc, allocator.free, self._register, self._unregister)
        self._closed = False
        self._impatient = threading.Event()

    def put(self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Copy registered memory to new objects; a code for each: 0 or NO_SPACE."""
        codes = _checked(self._store.batch_put_from(list(keys), list(addresses), list(sizes), self._pinned))
        if REFUSED in codes:
            raise self._forgotten()
        return codes

    def get(self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Copy objects to registered memory; the number of bytes for each, or a code below 0."""
        codes = _checked(self._store.batch_get_into(list(keys), list(addresses), list(sizes)))
        if REFUSED in codes:  # an object larger than its memory, or a mooncake_client that does not know this memory
            probe = f"probe/{secrets.token_hex(8)}"
            self.put([probe], [addresses[codes.index(REFUSED)]], [1])
            self.remove([probe])
        return codes

    def put_bytes(self, key: str, value: bytes) -> int:
        """Store `value`; 0 or NO_SPACE. UserError when it is too large for `staging_bytes`."""
        code = _checked([self._store.put(key, value, self._pinned)])[0]
        if code == REFUSED:
            raise UserError(f"{key} has {len(value)} bytes, more than fits store.staging_bytes: raise it")
        return code

    def get_bytes(self, key: str) -> bytes:
        """The value; empty when there is none."""
        return self._store.get(key)

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Which of `keys` are there, complete."""
        return [code == 1 for code in _checked(self._store.batch_is_exist(list(keys)))]

    def remove(self, keys: Sequence[str]) -> None:
        """Remove by force, that is also during somebody's read lease. Keys that are not there are done already."""
        _checked(self._store.batch_remove(list(keys), True))

    def remove_matching(self, pattern: str) -> int:
        """Remove by force whatever matches the (ECMAScript) pattern; returns how many. Scans all keys of the master."""
        return _checked([self._store.remove_by_regex(pattern, True)])[0]

    def retry(self, action: Callable[[], T]) -> T:
        """Run `action` again until no peer is missing.

        Raises:
            StoreUnavailableError: master or mooncake_client stayed away for `unavailable_timeout_s`.
            OwnerGoneError: the storage process stayed away for `owner_timeout_s`.
        """
        began, pause, num_thrown_away = time.monotonic(), FIRST_PAUSE_S, 0
        while True:
            try:
                return action()
            except TransientError as error:
                if error.code == NOT_FOUND:  # the master answers, however long the call took
                    num_thrown_away, began = num_thrown_away + 1, time.monotonic()
                    if num_thrown_away == PUT_TRIES:
                        raise self._thrown_away() from None
                patience = self.owner_timeout_s if error.code == OWNER_GONE else self.unavailable_timeout_s
                waited = time.monotonic() - began
                if waited + pause > patience or self._impatient.is_set():
                    raise self._absence(error.code, waited) from None
            self._impatient.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def stop_waiting(self) -> None:
        """From now on `retry` tries once."""
        self._impatient.set()

    def close(self) -> None:
        """Disconnect."""
        if self._closed:
            return
        self._closed = True
        if self.client_address is None:
            self._store.close()
        del self._store  # of a shared-memory client `close` would complain on stderr that it is not connected

    def _register(self, address: int, num_bytes: int) -> None:
        if self._store.register_buffer(address, num_bytes):  # the base of a new block: only a lost peer can refuse it
            raise TransientError(UNREACHABLE[1])

    def _unregister(self, address: int) -> None:
        if not self._closed:  # else it went with the connection, and the library would crash
            self._store.unregister_buffer(address)

    def _forgotten(self) -> StoreUnavailableError:
        """The library gives its memory to a new mooncake_client only if it noticed that the old one was gone."""
        return StoreUnavailableError(
            f"mooncake_client {self.client_address} does not know the memory of this process: it was started again before "
            "this process missed it. Start this process again, and next time wait 8 s before starting mooncake_client"
        )

    def _thrown_away(self) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"Mooncake master {self.master_address} threw a put away {PUT_TRIES} times before it was complete: the link is "
            "cut again and again, or too slow for the master's --put_start_discard_timeout_sec"
        )

    def _absence(self, code: int, waited: float) -> StoreUnavailableError:
        remedy = "start it again and resume the run; features that it held are captured again"
        if code == OWNER_GONE:
            return OwnerGoneError(
                f"the storage process behind Mooncake master {self.master_address} is gone for {waited:.0f} s: {remedy}"
            )
        peers = {self.master_address: "Mooncake master"}
        if self.client_address:
            peers = {self.client_address: "mooncake_client", **peers}
        silent = " and ".join(f"{name} {address}" for address, name in peers.items() if not listens(address))
        silent = silent or f"Mooncake at {self.client_address or self.master_address}"
        return StoreUnavailableError(f"{silent} did not answer for {waited:.0f} s (code {code}): {remedy}")


class MooncakeAdmin:
    """The master's HTTP port (`--metrics_port`).

    Raises:
        StoreUnavailableError: from every call, when it does not answer.
    """

    def __init__(self, address: str):
        self.address = address
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def list_keys(self) -> list[str]:
        """Every object of every store at this master."""
        return self._read("/get_all_keys").split()

    def gauge(self, name: str) -> int:
        """A metric without labels."""
        lines = (line.split() for line in self._read("/metrics").splitlines())
        return next(int(float(line[1])) for line in lines if line[:1] == [name])

    def is_ready(self) -> bool:
        """Whether the master says so."""
        return bool(json.loads(self._read("/health")).get("service_ready"))

    def _read(self, path: str) -> str:
        try:
            with self._opener.open(f"http://{self.address}{path}", timeout=10) as response:
                return response.read().decode()
        except (OSError, urllib.error.URLError) as error:
            raise StoreUnavailableError(
                f"the metrics port {self.address} of the Mooncake master does not answer ({error}): restart the master, "
                "or correct store.metrics_address"
            ) from error


def import_mooncake() -> Any:
    """Mooncake's store module. UserError with the remedy when it is missing."""
    for name, value in (TRANSFER_SETTINGS | LOG_SETTINGS).items():
        os.environ.setdefault(name, value)
    try:
        import mooncake.store
    except ImportError as error:  # the package, or one of the shared libraries that it needs
        raise UserError(f"cannot load Mooncake ({error}): {INSTALL}") from error
    return mooncake.store


def listens(address: str) -> bool:
    """Whether something accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False


def check_listening(address: str, what: str, remedy: str) -> None:
    """Raise UserError unless something accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"the address of the {what} is {address!r}, expected host:port")
    if not listens(address):
        raise UserError(f"no {what} listens at {address}: {remedy}")


def _checked(codes: list[int]) -> list[int]:
    for code in codes:
        if code in UNREACHABLE or code == OWNER_GONE:
            raise TransientError(code)
    return codes

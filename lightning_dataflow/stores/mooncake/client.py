"""A connection to Mooncake: its return codes as exceptions, and bounded waits for peers that are gone."""

import ctypes
import logging
import mmap
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.waiting import Wait
from lightning_dataflow.stores.base import StoreUnavailableError
from lightning_dataflow.stores.mooncake.buffers import Block, BufferPool
from lightning_dataflow.stores.mooncake.library import has_raw_calls, import_mooncake

T = TypeVar("T")

NO_SPACE, REFUSED, LEASE_EXPIRED, OWNER_GONE = -200, -600, -707, -800
UNREACHABLE = (-1, -900, -901)
NOT_FOUND = -704
"""For a put: the master discarded the incomplete object, because it took longer than `--put_start_discard_timeout_sec`."""
STAGING_BYTES = 256 << 20
"""Memory inside Mooncake for the plain calls: the largest value that they move."""
PUT_TRIES = 3
PROBE_TIMEOUT_S = 1.0
LONGEST_CALL_S = 35.0
"""The library gives up on a hanging peer after 30 s."""
PATIENCE_S = 90.0
"""A peer that stands still for a minute, and comes back, ends nothing."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5

logger = logging.getLogger(__name__)


class OwnerGoneError(StoreUnavailableError):
    """The storage process of an object is gone."""


class TransientError(Exception):
    """A peer is gone and may come back: `MooncakeClient.retry` waits for it."""

    def __init__(self, code: int):
        super().__init__(f"Mooncake answered {code}")
        self.code = code


class MooncakeClient:
    """One connection, shared by all threads of a process.

    Args:
        master_address: host:port of the master.
        client_address: host:port of a `mooncake_client` on this machine: bytes move through shared memory. None: this
            process transfers by itself with `protocol`.
        zero_copy: False moves bytes with Mooncake's plain calls, for values of up to STAGING_BYTES. So does a release of
            Mooncake that lacks the calls on raw memory. The objects are the same.

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
        zero_copy: bool = True,
        owner_timeout_s: float = PATIENCE_S,
        unavailable_timeout_s: float = PATIENCE_S,
    ):
        self.master_address, self.client_address = master_address, client_address
        self.owner_timeout_s, self.unavailable_timeout_s = owner_timeout_s, unavailable_timeout_s
        self._addresses = {"mooncake_client": client_address} if client_address else {}
        self._addresses |= {"Mooncake master": master_address}
        mooncake = import_mooncake()
        self._raw = zero_copy and has_raw_calls(mooncake.MooncakeDistributedStore)
        # Setup itself would block for 90 s when nothing listens.
        check_listening(master_address, "Mooncake master", "start mooncake_master there, or correct store.address")
        if client_address is not None:
            remedy = "start it on this machine, or leave out store.client_address"
            check_listening(client_address, "mooncake_client", remedy)
        self._store = mooncake.MooncakeDistributedStore()
        self._pinned = mooncake.ReplicateConfig()
        self._pinned.with_hard_pin = True  # never evicted: a full store refuses instead of losing samples
        staging_bytes = 0 if self._raw else STAGING_BYTES
        if client_address is None:
            places = (local_hostname, "P2PHANDSHAKE", 0, staging_bytes, protocol, rdma_devices, master_address)
            code = self._store.setup(*places)
        else:
            code = self._store.setup_dummy(0, staging_bytes, client_address)
        if code:
            peer = client_address or master_address
            raise UserError(f"Mooncake at {peer} refused this process (code {code}): see the logs of Mooncake there")
        self._shared_memory = mooncake.MooncakeHostMemAllocator() if self._raw and client_address is not None else None
        self.pool = BufferPool(self._allocate, self._free)
        self._closed = False
        self._stopping = threading.Event()

    def lease(self, num_bytes: int) -> ctypes.Array:
        """A buffer that `put` and `get` can use; see BufferPool."""
        return self.retry(lambda: self.pool.lease(num_bytes))

    def put(self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Copy registered memory to new objects; a code for each: 0 or NO_SPACE.

        Raises TransientError where `mooncake_client` no longer knows this memory: lease other memory, and try again.
        """
        if not self._raw:
            values = [ctypes.string_at(address, size) for address, size in zip(addresses, sizes, strict=True)]
            return [self._put_plain(key, value) for key, value in zip(keys, values, strict=True)]
        codes = _checked(self._store.batch_put_from(list(keys), list(addresses), list(sizes), self._pinned))
        if REFUSED in codes:
            self._register_again()
            raise TransientError(REFUSED)
        return codes

    def get(self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Copy objects to registered memory; the number of bytes for each, or a code below 0. Raises as `put` does."""
        if not self._raw:
            return [self._get_plain(*each) for each in zip(keys, addresses, sizes, strict=True)]
        codes = _checked(self._store.batch_get_into(list(keys), list(addresses), list(sizes)))
        if REFUSED in codes:  # an object larger than its memory, or a mooncake_client that does not know this memory
            probe = f"probe/{secrets.token_hex(8)}"
            self.put([probe], [addresses[codes.index(REFUSED)]], [1])
            self.remove([probe])
        return codes

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Which of `keys` are stored completely."""
        return [code == 1 for code in _checked(self._store.batch_is_exist(list(keys)))]

    def stored_bytes(self, key: str) -> int:
        """Size of an object, or a code below 0. Takes a read lease."""
        return _checked([self._store.get_size(key)])[0]

    def remove(self, keys: Sequence[str]) -> None:
        """Remove by force, even while a reader has a lease. Keys that do not exist count as removed."""
        _checked(self._store.batch_remove(list(keys), True))

    def remove_matching(self, pattern: str) -> None:
        """Remove by force whatever matches the (ECMAScript) pattern. Scans all keys of the master."""
        _checked([self._store.remove_by_regex(pattern, True)])

    def retry(self, action: Callable[[], T]) -> T:
        """Repeat `action` until no peer is missing.

        Raises:
            StoreUnavailableError: master or mooncake_client stayed away for `unavailable_timeout_s`.
            OwnerGoneError: the storage process stayed away for `owner_timeout_s`.
        """
        wait, pause, num_discarded = Wait(self._peers, longest_call_s=LONGEST_CALL_S), FIRST_PAUSE_S, 0
        while True:
            try:
                return action()
            except TransientError as error:
                if error.code == NOT_FOUND:  # the master answers, however long the call took
                    num_discarded += 1
                    wait.restart()
                    if num_discarded == PUT_TRIES:
                        raise StoreUnavailableError(
                            f"Mooncake master {self.master_address} discarded a put {PUT_TRIES} times before it was "
                            "complete: the link is cut again and again, or too slow for the master's "
                            "--put_start_discard_timeout_sec"
                        ) from None
                patience = self.owner_timeout_s if error.code == OWNER_GONE else self.unavailable_timeout_s
                waited = wait.seconds()
                if waited + pause > patience or self._stopping.is_set():
                    raise self._absence(error.code, waited) from None
            self._stopping.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _peers(self) -> str:
        return " or ".join(f"{name} {address}" for name, address in self._addresses.items())

    def stop_waiting(self) -> None:
        """From now on `retry` tries once."""
        self._stopping.set()

    def close(self) -> None:
        """Disconnect. Tensors that were read stay valid."""
        if self._closed:
            return
        self.pool.close()
        self._closed = True
        if self.client_address is None:
            self._store.close()
        del self._store  # `close` of a shared-memory client would complain on stderr that it is not connected

    def _register_again(self) -> None:
        """From now on lease new memory.

        `mooncake_client` forgets a process that was not heard of for 10 s, because it stood still or the client did, and so
        does one that was started again. It then takes in what the process allocates from then on, and nothing older.
        """
        logger.warning(
            "mooncake_client %s no longer knows this process's memory; allocating new memory", self.client_address
        )
        old, self.pool = self.pool, BufferPool(self._allocate, self._free)
        old.close()

    def _put_plain(self, key: str, value: bytes) -> int:
        (code,) = _checked([self._store.put(key, value, self._pinned)])
        if code == REFUSED:
            raise UserError(
                f"{key} has {len(value)} bytes, without raw calls Mooncake moves at most {STAGING_BYTES}: set "
                "store.zero_copy=true, or lower data.max_length"
            )
        return code

    def _get_plain(self, key: str, address: int, size: int) -> int:
        value = self._store.get(key)
        if len(value) != size:
            return REFUSED if value else NOT_FOUND
        ctypes.memmove(address, value, size)
        return size

    def _allocate(self, num_bytes: int) -> Block:
        if self._shared_memory is None:
            pages = mmap.mmap(-1, num_bytes)
            block = Block(ctypes.addressof(ctypes.c_char.from_buffer(pages)), num_bytes, pages)
        else:
            block = Block(self._shared_memory.alloc(num_bytes), num_bytes, None)
        if not block.address:
            raise MemoryError(f"no memory for a transfer buffer of {num_bytes} bytes: free memory, or use smaller samples")
        # The address is the base of a new block, so only a lost peer can refuse it.
        if self._raw and self._store.register_buffer(block.address, num_bytes):
            self._release_memory(block)
            raise TransientError(UNREACHABLE[1])
        return block

    def _free(self, block: Block) -> None:
        if self._raw and not self._closed:  # closing has unregistered everything, and the library would crash
            self._store.unregister_buffer(block.address)
        self._release_memory(block)

    def _release_memory(self, block: Block) -> None:
        if self._shared_memory is not None:
            self._shared_memory.free(block.address)

    def _absence(self, code: int, waited: float) -> StoreUnavailableError:
        remedy = "start it again and resume the run; features that it held are captured again"
        if code == OWNER_GONE:
            return OwnerGoneError(
                f"the storage process behind Mooncake master {self.master_address} is gone for {waited:.0f} s: {remedy}"
            )
        silent = [f"{name} {address}" for name, address in self._addresses.items() if not listens(address)]
        peer = " and ".join(silent) or f"Mooncake at {self.client_address or self.master_address}"
        if code == REFUSED:
            return StoreUnavailableError(f"{peer} does not take the memory of this process: start this process again")
        return StoreUnavailableError(f"{peer} did not answer for {waited:.0f} s (code {code}): {remedy}")


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

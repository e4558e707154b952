"""What the master of a Mooncake says over HTTP."""

import http.client
import urllib.request

from lightning_dataflow.contracts.foreign import first_line, parse_json
from lightning_dataflow.contracts.waiting import LONGEST_CALL_S
from lightning_dataflow.stores.base import StoreUnavailableError

MAX_ANSWER_BYTES = 256 << 20


class MooncakeAdmin:
    """The master's HTTP port (`--metrics_port`).

    Raises:
        StoreUnavailableError: from every call, when it does not answer, or is no Mooncake master.
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
        try:
            return int(float(next((line[1] for line in lines if line[:1] == [name]), "")))
        except (IndexError, ValueError, OverflowError) as error:
            raise self._no_master() from error

    def is_ready(self) -> bool:
        """Whether the master says so."""
        health = parse_json(self._read("/health"), "/health")
        if not isinstance(health, dict):
            raise self._no_master()
        return bool(health.get("service_ready"))

    def _no_master(self) -> StoreUnavailableError:
        return StoreUnavailableError(f"what answers at {self.address} is no Mooncake master: correct store.metrics_address")

    def _read(self, path: str) -> str:
        try:
            with self._opener.open(f"http://{self.address}{path}", timeout=LONGEST_CALL_S) as response:
                answer = response.read(MAX_ANSWER_BYTES + 1)
            # A part of the keys is not enough: a sweep would miss the others.
            if len(answer) > MAX_ANSWER_BYTES:
                raise OSError(f"{path} has more than {MAX_ANSWER_BYTES} bytes")
            if response.length:
                raise OSError(f"the last {response.length} bytes of {path} are missing")
            return answer.decode()
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            raise StoreUnavailableError(
                f"the metrics port {self.address} of the Mooncake master does not answer ({first_line(error)}): restart "
                "the master, or correct store.metrics_address"
            ) from error

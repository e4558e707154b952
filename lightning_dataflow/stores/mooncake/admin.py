"""What the master of a Mooncake says over HTTP."""

import urllib.request

from lightning_dataflow.contracts.foreign import parse_json
from lightning_dataflow.stores.base import StoreUnavailableError


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
        return bool(parse_json(self._read("/health"), "/health").get("service_ready"))

    def _read(self, path: str) -> str:
        try:
            with self._opener.open(f"http://{self.address}{path}", timeout=10) as response:
                return response.read().decode()
        except OSError as error:
            raise StoreUnavailableError(
                f"the metrics port {self.address} of the Mooncake master does not answer ({error}): restart the master, "
                "or correct store.metrics_address"
            ) from error

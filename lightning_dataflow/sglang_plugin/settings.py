"""The one file that a capture server is configured with."""

import json
import os
import threading
import time
import tomllib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.sglang_plugin.wire import SERVER_FILE
from lightning_dataflow.stores import FeatureStore, MooncakeFeatureStore, SharedDirFeatureStore, StoreUnavailableError

MAX_STORES = 4
"""Runs that one server captures for at a time without connecting anew."""
PATIENCE_S = 3.0
"""For a store that is gone: the scheduler waits with the request."""
REST_S = 5.0
"""After that, what is asked of this store fails at once for so long: other requests are served meanwhile."""
MOONCAKE_ARGUMENTS = {
    "address": "master_address",
    "client_address": "client_address",
    "metrics_address": "metrics_address",
    "hostname": "local_hostname",
    "protocol": "protocol",
    "rdma_devices": "rdma_devices",
    "zero_copy": "zero_copy",
    "capacity_bytes": "capacity_bytes",
}
"""Settings of `store.*`, and what MooncakeFeatureStore calls them."""
_SHARED_DIR = ("root", "secret", "capacity_bytes")


class ServerStores:
    """Stores by store_id, connected when they are first asked for.

    Args:
        settings: `{"store": "mooncake", "address": …}` or `{"store": "shared_dir", "root": …}`; further names are those of
            the `store.*` settings, and `secret`.
    """

    def __init__(self, settings: dict[str, Any]):
        kind = settings.pop("store", "mooncake")
        known = {"mooncake": tuple(MOONCAKE_ARGUMENTS), "shared_dir": _SHARED_DIR}.get(kind)
        if known is None:
            raise UserError(f"store={kind} in the server's file is unknown: use mooncake or shared_dir")
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise UserError(f"unknown settings {unknown} in the server's file: {kind} knows {', '.join(known)}")
        needed = "address" if kind == "mooncake" else "root"
        if needed not in settings:
            raise UserError(f"the server's file names no {needed}, which store={kind} needs")
        self._kind, self._settings = kind, settings
        self._open: OrderedDict[str, FeatureStore] = OrderedDict()
        self._lost: tuple[float, str] = (-REST_S, "")  # all stores are behind one address

    @contextmanager
    def use(self, store_id: str) -> Iterator[FeatureStore]:
        """The store of a run, connected anew after it was lost.

        Raises:
            StoreUnavailableError: it cannot be reached, or could not a moment ago.
        """
        since, reason = self._lost
        if time.monotonic() - since < REST_S:
            raise StoreUnavailableError(reason)
        try:
            yield self._get(store_id)
        except StoreUnavailableError as error:
            self._lost = (time.monotonic(), str(error))
            while self._open:  # connections to a Mooncake that is started again may be of no use
                threading.Thread(target=self._open.popitem()[1].close, daemon=True).start()  # may wait for it
            raise

    def _get(self, store_id: str) -> FeatureStore:
        if store_id not in self._open:
            store = self._connect(store_id)
            if len(self._open) == MAX_STORES:
                self._open.popitem(last=False)[1].close()
            self._open[store_id] = store
        self._open.move_to_end(store_id)
        return self._open[store_id]

    def _connect(self, store_id: str) -> FeatureStore:
        if self._kind == "shared_dir":
            return SharedDirFeatureStore(**self._settings)
        arguments = {MOONCAKE_ARGUMENTS[name]: value for name, value in self._settings.items()}
        try:
            return MooncakeFeatureStore(store_id, owner_timeout_s=PATIENCE_S, unavailable_timeout_s=PATIENCE_S, **arguments)
        except UserError as error:  # nobody listens: no fault of the prompt, and somebody may later
            raise StoreUnavailableError(str(error)) from error


def read_settings() -> ServerStores:
    """From the file that the environment names, TOML or JSON. Raises UserError naming what is wrong with it."""
    name = os.environ.get(SERVER_FILE)
    if not name:
        raise UserError(
            f"the server was started without {SERVER_FILE}=FILE, which says where features go: see docs/sglang.md"
        )
    path = Path(name)
    try:
        text = path.read_text()
        settings = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise UserError(f"the server cannot read {SERVER_FILE}={name}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{SERVER_FILE}={name} is neither JSON nor TOML (by its suffix): {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{SERVER_FILE}={name} holds no table of settings")
    return ServerStores(settings)

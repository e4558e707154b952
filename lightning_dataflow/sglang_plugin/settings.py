"""The settings file of a capture server."""

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
"""Connections that are kept, one for each run."""
PATIENCE_S = 3.0
"""How long to wait for a store that is gone. The scheduler is blocked meanwhile."""
REST_S = 5.0
"""How long requests then fail at once, so that the scheduler serves other requests."""
KNOWN = {
    "mooncake": (
        *("address", "client_address", "metrics_address", "hostname", "protocol", "rdma_devices", "zero_copy"),
        "capacity_bytes",
    ),
    "shared_dir": ("root", "secret", "capacity_bytes"),
}
NEEDED = {"mooncake": "address", "shared_dir": "root"}
ARGUMENTS = {"address": "master_address", "hostname": "local_hostname"}
"""Settings whose argument of MooncakeFeatureStore has another name."""


class ServerStores:
    """Stores by store_id, connected when they are first used.

    Args:
        settings: `{"store": "mooncake", "address": …}` or `{"store": "shared_dir", "root": …}`; further names are those of
            the `store.*` settings, and `secret`.
    """

    def __init__(self, settings: dict[str, Any]):
        kind = settings.pop("store", "mooncake")
        if kind not in KNOWN:
            raise UserError(f"store={kind} in the server's file is unknown: use {' or '.join(KNOWN)}")
        unknown = sorted(settings.keys() - set(KNOWN[kind]))
        if unknown:
            raise UserError(f"unknown settings {unknown} in the server's file: {kind} knows {', '.join(KNOWN[kind])}")
        if NEEDED[kind] not in settings:
            raise UserError(f"the server's file names no {NEEDED[kind]}, which store={kind} needs")
        self._kind, self._settings = kind, settings
        self._open: OrderedDict[str, FeatureStore] = OrderedDict()
        self._lost: tuple[float, str] = (-REST_S, "")  # (when, why); all stores have one address

    @contextmanager
    def use(self, store_id: str) -> Iterator[FeatureStore]:
        """The store of a run; reconnects after it was lost.

        Raises:
            StoreUnavailableError: the store cannot be reached, or could not less than REST_S ago.
        """
        since, reason = self._lost
        if time.monotonic() - since < REST_S:
            raise StoreUnavailableError(reason)
        try:
            yield self._get(store_id)
        except StoreUnavailableError as error:
            self._lost = (time.monotonic(), str(error))
            while self._open:  # old connections may not work with a Mooncake that was restarted
                threading.Thread(target=self._open.popitem()[1].close, daemon=True).start()  # close may block
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
        arguments = {ARGUMENTS.get(name, name): value for name, value in self._settings.items()}
        try:
            return MooncakeFeatureStore(store_id, owner_timeout_s=PATIENCE_S, unavailable_timeout_s=PATIENCE_S, **arguments)
        except UserError as error:  # nothing listens there yet: the request is fine and can be retried
            raise StoreUnavailableError(str(error)) from error


def read_settings() -> ServerStores:
    """Read the file that the environment variable names, TOML or JSON. Raises UserError naming what is wrong with it."""
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

"""The target of a run whose features come from SGLang servers."""

import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dataflow.config.schema import StoreConfig, TargetConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.streams import read_secret, shared_dir_root, store_id
from lightning_dataflow.services.sglang import LocalSGLang
from lightning_dataflow.stores import FeatureStore, SharedDirFeatureStore
from lightning_dataflow.targets import SGLangServerTarget

if TYPE_CHECKING:
    from lightning_dataflow.run.builder import Builder

SHARED_MEMORY = Path("/dev/shm")

logger = logging.getLogger(__name__)


def served_target(parts: "Builder") -> SGLangServerTarget:
    """Connect to the servers of `target.urls`, or start one here; features go into the run's store."""
    config = parts.config
    target, store, name = config.target, parts.shared_store, store_id(config, parts.plane)
    if target.urls:
        return _connect(parts, list(target.urls), read_api_key(target), store, name)
    server = start_server(parts, server_settings(config.store, config.channel.path))
    return _connect(parts, [server.url], server.api_key, store, name)


def local_target(parts: "Builder") -> SGLangServerTarget:
    """Start a server here, which hands features over through a folder in memory."""
    folder = parts.resources.enter_context(exchange_folder())
    store = SharedDirFeatureStore(folder)
    server = start_server(parts, {"store": "shared_dir", "root": folder})
    return _connect(parts, [server.url], server.api_key, store, "exchange")


def start_server(parts: "Builder", store: Mapping[str, Any]) -> LocalSGLang:
    """Start an SGLang server that ends with `parts`; `store` says where it puts features."""
    config = parts.config
    target = config.target
    if target.server_python is None and importlib.util.find_spec("sglang") is None:
        raise UserError(
            f"target.engine={target.engine} needs SGLang here: pip install 'lightning-dataflow[sglang]', or name the "
            "Python of another environment with target.server_python"
        )
    logger.info("starting an SGLang server")
    server = LocalSGLang(
        target.path,
        parts.layer_ids,
        python=target.server_python or sys.executable,
        store=store,
        folder=config.run_dir,
        api_key=read_api_key(target),
        arguments=target.server_args,
    )
    parts.resources.callback(server.close)
    logger.info("SGLang server at %s, log in %s", server.url, server.log_path)
    return server


def exchange_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that a server here hands features over in; in memory where the system has such a place."""
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="lightning-dataflow-", dir=parent)


def _connect(
    parts: "Builder", urls: Sequence[str], api_key: str | None, store: FeatureStore, store_id: str
) -> SGLangServerTarget:
    target = SGLangServerTarget(
        parts.config.target.path,
        urls=urls,
        store=store,
        store_id=store_id,
        layer_ids=parts.layer_ids,
        features=parts.hidden_states,
        api_key=api_key,
        in_flight=parts.config.target.requests_in_flight,
    )
    parts.resources.callback(target.stop_waiting)
    return target


def server_settings(store: StoreConfig, channel_path: str) -> dict[str, Any]:
    """The server's file for the store of a run."""
    if store.kind == "shared_dir":
        root = str(Path(shared_dir_root(store, channel_path)).absolute())
        settings = {"root": root, "secret": read_secret(store), "capacity_bytes": store.capacity_bytes}
    else:
        names = ("address", "client_address", "metrics_address", "hostname", "protocol", "rdma_devices", "zero_copy")
        settings = {name: getattr(store, name) for name in (*names, "capacity_bytes")}
    return {"store": store.kind, **{name: value for name, value in settings.items() if value is not None}}


def read_api_key(target: TargetConfig) -> str | None:
    """The content of the key's file, without white space around it."""
    name = target.api_key_file
    if name is None:
        return None
    try:
        key = Path(name).read_text(errors="replace").strip()
    except OSError as error:
        raise UserError(f"cannot read target.api_key_file={name}: {error.strerror}") from error
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"target.api_key_file={name} holds no key: it must be one line of printable ASCII")
    return key

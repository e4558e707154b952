"""The target of a run whose features come from SGLang: from servers, or from an engine of this process."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dataflow.config.schema import StoreConfig, TargetConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.streams import read_secret, shared_dir_root, store_id
from lightning_dataflow.services.sglang import LocalSGLang
from lightning_dataflow.sglang_plugin.wire import SERVER_FILE
from lightning_dataflow.stores import SharedDirFeatureStore
from lightning_dataflow.targets import SGLangServerTarget
from lightning_dataflow.targets.sglang_engine import SGLangTarget, exchange_folder

if TYPE_CHECKING:
    from lightning_dataflow.run.builder import Builder


def served_target(parts: "Builder") -> SGLangServerTarget:
    """Connect to the servers that are given, or start one here."""
    config = parts.config
    target, store = config.target, parts.shared_store
    if target.urls:
        urls, api_key = list(target.urls), read_api_key(target)
    else:
        server = start_server(parts)
        urls, api_key = [server.url], server.api_key
    return SGLangServerTarget(
        target.path,
        urls=urls,
        store_id=store_id(config, parts.plane),
        layer_ids=parts.layer_ids,
        store_uri=store.uri,
        reader=store,
        api_key=api_key,
        in_flight=target.requests_in_flight,
    )


def start_server(parts: "Builder") -> LocalSGLang:
    """Start one on this machine, to end with `parts`."""
    config = parts.config
    print("starting an SGLang server", flush=True)
    server = LocalSGLang(
        config.target.path,
        parts.layer_ids,
        python=config.target.server_python or sys.executable,
        store=server_settings(config.store, config.channel.path),
        folder=config.run_dir,
        api_key=read_api_key(config.target),
        arguments=config.target.server_args,
    )
    parts.resources.callback(server.close)
    print(f"SGLang server at {server.url}, log in {server.log_path}", flush=True)
    return server


def engine_target(parts: "Builder") -> SGLangTarget:
    """SGLang in this process."""
    config = parts.config
    folder = Path(parts.resources.enter_context(exchange_folder()))
    settings = folder / "server.json"
    settings.write_text(json.dumps({"store": "shared_dir", "root": str(folder / "features")}))
    os.environ[SERVER_FILE] = str(settings)  # the engine's process is spawned, and looks there
    target = SGLangTarget(
        config.target.path,
        layer_ids=parts.layer_ids,
        store=SharedDirFeatureStore(folder / "features"),
        arguments=config.target.server_args,
    )
    parts.resources.callback(target.close)
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

"""The target of a run whose features come from SGLang servers."""

import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning_dataflow.config.derived import is_disaggregated, shared_dir_root
from lightning_dataflow.config.schema import StoreConfig, TargetConfig, TrainConfig
from lightning_dataflow.config.secrets import read_api_key, read_secret
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.ranks import num_devices
from lightning_dataflow.services.sglang import LocalSGLang
from lightning_dataflow.sglang_plugin.settings import KNOWN
from lightning_dataflow.stores import FeatureStore, SharedDirFeatureStore
from lightning_dataflow.targets import SGLangServerTarget

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


def served_target(
    config: TrainConfig, store: FeatureStore, store_id: str, resources: ExitStack, **capture: Any
) -> SGLangServerTarget:
    """Connect to the servers of `target.urls`, or start one here; features go into the run's store.

    Args:
        capture: `layer_ids` and `features` of the target.
    """
    urls, api_key = list(config.target.urls), read_api_key(config.target)
    if not urls:
        settings = server_settings(config.store, config.channel.path)
        server = start_server(config, capture["layer_ids"], settings, resources)
        urls, api_key = [server.url], server.api_key
    return _connect(config.target, resources, store=store, store_id=store_id, urls=urls, api_key=api_key, **capture)


def local_target(config: TrainConfig, resources: ExitStack, **capture: Any) -> SGLangServerTarget:
    """Start a server here, which hands features over through a folder in memory."""
    folder = resources.enter_context(exchange_folder())
    server = start_server(config, capture["layer_ids"], {"store": "shared_dir", "root": folder}, resources)
    capture |= {"store": SharedDirFeatureStore(folder), "store_id": "exchange"}
    return _connect(config.target, resources, urls=[server.url], api_key=server.api_key, **capture)


def start_server(
    config: TrainConfig, layer_ids: Sequence[int], store: Mapping[str, Any], resources: ExitStack
) -> LocalSGLang:
    """Start an SGLang server that ends with `resources`; `store` says where it puts features."""
    target = config.target
    if target.server_python is None and importlib.util.find_spec("sglang") is None:
        raise UserError(
            f"target.engine={target.engine} needs SGLang here: pip install 'lightning-dataflow[sglang]', or name the "
            "Python of another environment with target.server_python"
        )
    log.info("starting an SGLang server")
    server = LocalSGLang(
        target.path,
        layer_ids,
        python=target.server_python or sys.executable,
        store=store,
        folder=config.run_dir,
        api_key=read_api_key(target),
        arguments=target.server_args,
    )
    resources.callback(server.close)
    log.info("SGLang server at %s, log in %s", server.url, server.log_path)
    return server


def exchange_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that a server here hands features over in; in memory where the system has such a place."""
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="lightning-dataflow-", dir=parent)


def _connect(settings: TargetConfig, resources: ExitStack, **arguments: Any) -> SGLangServerTarget:
    target = SGLangServerTarget(settings.path, in_flight=settings.requests_in_flight, **arguments)
    resources.callback(target.stop_waiting)
    return target


def check_one_engine(config: TrainConfig) -> None:
    """Raise UserError where ranks would share a server: the one that a trainer starts for itself takes the first GPUs, so a
    second rank would find them taken."""
    ranks = num_devices(config.trainer)
    if config.target.engine == "sglang" and not is_disaggregated(config) and ranks > 1:
        raise UserError(
            f"target.engine=sglang shares a machine with one trainer process, not {ranks}: set trainer.devices=1, or use "
            "target.engine=sglang_server with topology=disagg_online"
        )


def server_settings(store: StoreConfig, channel_path: str) -> dict[str, Any]:
    """The server's file for the store of a run."""
    if store.kind == "shared_dir":
        root = str(Path(shared_dir_root(store, channel_path)).absolute())
        settings = {"root": root, "secret": read_secret(store), "capacity_bytes": store.capacity_bytes}
    else:
        settings = {name: getattr(store, name) for name in KNOWN["mooncake"]}
    return {"store": store.kind, **{name: value for name, value in settings.items() if value is not None}}

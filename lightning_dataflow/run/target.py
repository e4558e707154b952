"""The target of a run whose features come from SGLang servers."""

import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_dataflow.config.files import read_api_key
from lightning_dataflow.config.schema import StoreConfig, TrainConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.ranks import num_devices
from lightning_dataflow.run.streams import store_settings
from lightning_dataflow.services.sglang import LocalSGLang
from lightning_dataflow.stores import FeatureStore, SharedDirFeatureStore
from lightning_dataflow.strategies.common.head_check import check_served_head
from lightning_dataflow.targets import SGLangServerTarget

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


def served_target(
    config: TrainConfig, store: FeatureStore, store_id: str, resources: ExitStack, **capture: Any
) -> SGLangServerTarget:
    """Connect to the servers of `target.urls`, or start one here; features go into `store`, the one of `config.store`.

    Args:
        capture: `layer_ids` and `features` of the target.
    """
    settings = config.target
    urls, api_key = list(settings.urls), read_api_key(settings)
    if not urls:
        server = start_server(config, capture["layer_ids"], resources)
        urls, api_key = [server.url], server.api_key
    capture |= {"urls": urls, "api_key": api_key, "store": store, "store_id": store_id}
    target = SGLangServerTarget(settings.path, in_flight=settings.requests_in_flight, **capture)
    resources.callback(target.stop_waiting)
    check_served_head(target)
    return target


def local_target(config: TrainConfig, resources: ExitStack, **capture: Any) -> SGLangServerTarget:
    """Start a server here, which hands features over through a folder; in memory where the system has such a place."""
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="lightning-dataflow-", dir=parent))
    target, store = replace(config.target, urls=[]), StoreConfig(kind="shared_dir", root=folder)
    own = replace(config, target=target, store=store)
    return served_target(own, SharedDirFeatureStore(folder), "exchange", resources, **capture)


def start_server(config: TrainConfig, layer_ids: Sequence[int], resources: ExitStack) -> LocalSGLang:
    """Start an SGLang server that puts features into the store of `config`, and ends with `resources`."""
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
        store=store_settings(config),
        folder=config.run_dir,
        api_key=read_api_key(target),
        arguments=target.server_args,
    )
    resources.callback(server.close)
    log.info("SGLang server at %s, log in %s", server.url, server.log_path)
    return server


def check_one_engine(config: TrainConfig) -> None:
    """Raise UserError where ranks would share a server: the one that a trainer starts for itself takes the first GPUs, so a
    second rank would find them taken."""
    ranks = num_devices(config.trainer)
    if config.target.engine == "sglang" and ranks > 1:
        raise UserError(
            f"target.engine=sglang shares a machine with one trainer process, not {ranks}: set trainer.devices=1, or use "
            "target.engine=sglang_server with topology=disagg_online"
        )

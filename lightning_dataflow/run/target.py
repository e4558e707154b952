"""The target of a run whose features come from SGLang: from a server, or from an engine of this process."""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning_dataflow.config.derived import is_disaggregated, shared_dir_root
from lightning_dataflow.config.schema import StoreConfig, TargetConfig, TrainConfig
from lightning_dataflow.config.secrets import read_api_key, read_secret_file
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.ranks import num_devices
from lightning_dataflow.services.sglang import LocalSGLang
from lightning_dataflow.sglang_plugin.wire import SERVER_FILE
from lightning_dataflow.stores import SharedDirFeatureStore
from lightning_dataflow.targets.sglang_engine import SGLangTarget, exchange_folder

log = logging.getLogger(__name__)


def start_server(
    target: TargetConfig, layer_ids: Sequence[int], store: Mapping[str, Any], folder: str, resources: ExitStack
) -> LocalSGLang:
    """Start an SGLang server on this machine, to end with `resources`.

    Args:
        store: the content of the server's file, see server_settings.
        folder: for that file and the server's log.
    """
    log.info("starting an SGLang server")
    server = LocalSGLang(
        target.path,
        layer_ids,
        python=target.server_python or sys.executable,
        store=store,
        folder=folder,
        api_key=read_api_key(target.api_key_file),
        arguments=target.server_args,
    )
    resources.callback(server.close)
    log.info("SGLang server at %s, log in %s", server.url, server.log_path)
    return server


def start_engine(target: TargetConfig, layer_ids: Sequence[int], resources: ExitStack) -> SGLangTarget:
    """SGLang in this process, to end with `resources`."""
    folder = Path(resources.enter_context(exchange_folder()))
    settings = folder / "server.json"
    settings.write_text(json.dumps({"store": "shared_dir", "root": str(folder / "features")}))
    os.environ[SERVER_FILE] = str(settings)  # the engine's process is spawned, and looks there
    store = SharedDirFeatureStore(folder / "features")
    engine = SGLangTarget(target.path, layer_ids=layer_ids, store=store, arguments=target.server_args)
    resources.callback(engine.close)
    return engine


def check_one_engine(config: TrainConfig) -> None:
    """Raise UserError where ranks would share an engine: it takes the first GPUs, and ends every child of its process,
    other ranks too, with itself."""
    ranks = num_devices(config.trainer)
    if config.target.engine == "sglang" and not is_disaggregated(config) and ranks > 1:
        raise UserError(
            f"target.engine=sglang shares a machine with one trainer process, not {ranks}: set trainer.devices=1, or use "
            "target.engine=sglang_server with topology=disagg_online"
        )


def server_settings(store: StoreConfig, channel_path: str) -> dict[str, Any]:
    """What a server must know of the store of a run, for its file."""
    if store.kind == "shared_dir":
        root = str(Path(shared_dir_root(store, channel_path)).absolute())
        secret = read_secret_file(store.secret_file, "store.secret_file")
        settings = {"root": root, "secret": secret, "capacity_bytes": store.capacity_bytes}
    else:
        names = ("address", "client_address", "metrics_address", "hostname", "protocol", "rdma_devices", "zero_copy")
        settings = {name: getattr(store, name) for name in (*names, "capacity_bytes")}
    return {"store": store.kind, **{name: value for name, value in settings.items() if value is not None}}

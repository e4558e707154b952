"""What all commands share: configuration, logging, and one-line errors."""

import logging
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_dataflow.app.schema import TrainConfig, register_schemas
from lightning_dataflow.contracts import CapacityError, UserError

Command = Callable[[TrainConfig, dict[str, Any]], Any]


def command(function: Command) -> Callable[[], None]:
    """Make a Hydra command of `function(config, settings)`: typed configuration, and the same as plain containers."""
    register_schemas()

    @hydra.main(version_base="1.3", config_path="pkg://lightning_dataflow.conf", config_name="train")
    @wraps(function)
    def run(config: DictConfig) -> Any:
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        _log_once()
        try:
            return function(typed(config), plain_settings(config))
        except (UserError, CapacityError, PermissionError, MisconfigurationException) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)

    return run


def typed(config: DictConfig) -> TrainConfig:
    """Dataclasses instead of omegaconf's containers: no library module sees those. Raises UserError for missing values."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"no value for {', '.join(missing)}: set it on the command line, for example {missing[0]}=…")
    return OmegaConf.to_object(config)  # type: ignore[return-value]


def plain_settings(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration for `result.json`, without secrets."""
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    if settings["store"]["secret"] is not None:
        settings["store"]["secret"] = "***"
    return settings


def _log_once() -> None:
    """Lightning installs handlers of its own; without them its messages reach Hydra's, once."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True

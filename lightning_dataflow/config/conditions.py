"""`with:` in conf/strategy/NAME.yaml: what a strategy needs with a target or in an experiment.

Hydra composes whole files only, so each entry is registered as a file: `experiment=tiny` in NAME.yaml becomes
`with_experiment/NAME-tiny`. conf/train.yaml composes it right after the experiment, so the command line still wins.
"""

from importlib.resources.abc import Traversable
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_dataflow.contracts import UserError

KEY = "with"
GROUPS = ("target", "experiment")


def register_conditions(conf: Traversable) -> None:
    """Register the `with:` entries of all strategies in a configuration folder.

    Raises:
        UserError: an entry is named after another group.
    """
    folder = conf / "strategy"
    for file in folder.iterdir() if folder.is_dir() else ():
        if not file.name.endswith(".yaml"):
            continue
        strategy: Any = OmegaConf.to_container(OmegaConf.create(file.read_text()))
        for condition, settings in (strategy.get(KEY) or {}).items():
            group, _, choice = condition.partition("=")
            if group not in GROUPS:
                raise UserError(f"{file}: with: {condition}: an entry is target=NAME or experiment=NAME")
            name = f"{file.name.removesuffix('.yaml')}-{choice}"
            ConfigStore.instance().store(group=f"with_{group}", name=name, node=settings, package="_global_")


def drop_conditions(config: DictConfig) -> None:
    """Remove `with:` from a composed configuration: its settings have been applied."""
    with open_dict(config.strategy):
        config.strategy.pop(KEY, None)

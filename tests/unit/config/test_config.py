"""Every shipped configuration composes into the typed schema."""

import json
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lightning_dataflow.config.parsing import parse_config, plain_settings
from lightning_dataflow.config.schema import CONTROLS, STORES, TrainConfig, register_schemas
from lightning_dataflow.contracts import UserError

CONF = Path(__file__).parents[3] / "conf"
GROUPS = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in CONF.iterdir() if path.is_dir()}
GROUPS = {group: names for group, names in GROUPS.items() if names}


def make(*overrides: str):
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_dataflow.conf", version_base="1.3"):
        config = compose("train", [*overrides, "hydra.runtime.output_dir=runs/x"], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        return config


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in GROUPS.items() for name in names])
def test_every_file_composes(group, name):
    config = parse_config(make(f"{group}={name}", "++target.path=folder"))
    assert isinstance(config, TrainConfig)


@pytest.mark.parametrize(("topology", "experiment"), list(product(GROUPS["topology"], GROUPS["experiment"])))
def test_experiments_compose_with_every_topology(topology, experiment):
    config = parse_config(make(f"topology={topology}", f"experiment={experiment}"))
    assert config.topology.name == topology
    assert config.store.kind in STORES[topology]
    assert config.control.kind in CONTROLS[topology]


@pytest.mark.parametrize(("strategy", "experiment"), list(product(GROUPS["strategy"], GROUPS["experiment"])))
def test_an_experiment_has_settings_of_its_own_for_each_strategy(strategy, experiment):
    plain = parse_config(make(f"strategy={strategy}", "sizes=paper"))
    config = parse_config(make(f"strategy={strategy}", f"experiment={experiment}"))
    assert config.strategy["name"] == strategy
    assert config.strategy.keys() == plain.strategy.keys()  # no setting of another strategy
    assert dict(config.strategy) != dict(plain.strategy)
    chosen = parse_config(make(f"strategy={strategy}", f"experiment={experiment}", "strategy.target_dtype=x"))
    assert chosen.strategy["target_dtype"] == "x"


@pytest.mark.parametrize("strategy", GROUPS["strategy"])
def test_another_target_needs_its_path_and_gets_the_sizes_of_the_papers(strategy):
    with pytest.raises(UserError, match=r"no value for target\.path: set it on the command line"):
        parse_config(make("target=hf"))
    paper = parse_config(make(f"strategy={strategy}", "sizes=paper")).strategy
    assert parse_config(make(f"strategy={strategy}", "target=hf", "target.path=folder")).strategy == paper


@pytest.mark.parametrize("strategy", GROUPS["strategy"])
def test_the_sizes_of_a_draft_follow_from_its_target(strategy):
    paper = parse_config(make(f"strategy={strategy}", "sizes=paper")).strategy
    small = parse_config(make(f"strategy={strategy}")).strategy
    assert small != paper
    assert parse_config(make(f"strategy={strategy}", "experiment=quickstart")).strategy == small
    assert parse_config(make(f"strategy={strategy}", "target=tiny")).strategy == paper


def test_settings_are_plain_containers():
    settings = plain_settings(make("store=shared_dir", "store.secret_file=secret.txt"))
    assert json.loads(json.dumps(settings))["store"]["secret_file"] == "secret.txt"


def test_a_missing_value_is_named():
    with pytest.raises(UserError, match=r"no value for data\.path: set it on the command line"):
        parse_config(make("data.path=???"))


def test_numbers_in_yaml_are_numbers():
    assert parse_config(make("optimizer.lr=1e-4")).optimizer.lr == 1e-4


@pytest.mark.parametrize("override", ["evaluate.vllm_args={max_model_len: 64}", "+evaluate.vllm_args.max_model_len=64"])
def test_arguments_of_vllm_as_the_documentation_gives_them(override):
    """Composed as the command does, where keys that are not there yet are refused."""
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_dataflow.conf", version_base="1.3"):
        config = compose("train", ["experiment=tiny", override])
    assert config.evaluate.vllm_args == {"max_model_len": 64}


def test_keys_of_the_groups_that_others_read_may_be_added():
    added = ("+callbacks.mine._target_=a.B", "+trainer.deterministic=true", "+logger.mine._target_=c.D", "+strategy.size=3")
    config = parse_config(make("logger=none", *added))
    assert (config.callbacks["mine"], config.logger["mine"]) == ({"_target_": "a.B"}, {"_target_": "c.D"})
    assert (config.trainer["deterministic"], config.strategy["size"]) == (True, 3)

"""Every shipped configuration composes into the typed schema."""

import json
from dataclasses import asdict
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lightning_dataflow.config.conditions import drop_conditions, register_conditions
from lightning_dataflow.config.parsing import parse_config
from lightning_dataflow.config.schema import TOPOLOGIES, TrainConfig, register_schemas
from lightning_dataflow.contracts import UserError

CONF = Path(__file__).parents[3] / "conf"
GROUPS = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in CONF.iterdir() if path.is_dir()}
GROUPS = {group: names for group, names in GROUPS.items() if names}


def strategy_file(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(CONF / "strategy" / f"{name}.yaml"))


def make(*overrides: str):
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_dataflow.conf", version_base="1.3"):
        config = compose("train", [*overrides, "hydra.runtime.output_dir=runs/x"], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        drop_conditions(config)
        return config


def composition(row: int) -> list[str]:
    """Twenty rows have each pair of topology, experiment and strategy, and each file of the other groups."""
    topologies, experiments = GROUPS["topology"], [*GROUPS["experiment"], None]
    experiment, settings = experiments[row % len(experiments)], {"topology": topologies[row % len(topologies)]}
    if experiment is None:
        own = row // len(experiments)
        settings |= {group: names[own % len(names)] for group, names in GROUPS.items() if group not in settings}
        del settings["experiment"]
    else:
        settings["experiment"] = experiment
    settings["strategy"] = GROUPS["strategy"][row % len(GROUPS["strategy"])]
    return [f"{group}={name}" for group, name in settings.items()]


ROWS = [composition(row) for row in range(20)]


def test_the_compositions_have_every_file_and_pair():
    assert {f"{group}={name}" for group, names in GROUPS.items() for name in names} == {one for row in ROWS for one in row}
    for first, second in combinations(("topology", "experiment", "strategy"), 2):
        for one, other in product(GROUPS[first], GROUPS[second]):
            assert any({f"{first}={one}", f"{second}={other}"} <= set(row) for row in ROWS)


@pytest.mark.integration
@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_every_file_composes(row):
    config, choices = parse_config(make(*row, "++target.path=folder")), dict(setting.split("=") for setting in row)
    assert config.topology.name == choices["topology"]
    assert config.strategy.keys() == strategy_file(choices["strategy"]).keys() - {
        "with"
    }  # and no setting of another strategy
    if "experiment" in choices:
        fitting = TOPOLOGIES[config.topology.name]
        assert config.store.kind in fitting["store"]
        assert config.control.kind in fitting["control"]


@pytest.mark.parametrize("strategy", GROUPS["strategy"])
def test_a_strategy_says_what_it_needs_for_targets_and_experiments_that_exist(strategy):
    entries = [entry.split("=") for entry in strategy_file(strategy)["with"]]
    assert all(choice in GROUPS[group] for group, choice in entries)
    assert {choice for group, choice in entries if group == "experiment"} >= {"tiny", "qwen3_8b"}


@pytest.mark.parametrize("overrides", [["target=hf", "target.path=folder"], ["~with_target"], ["target=tiny"]])
def test_other_targets_get_the_sizes_of_the_paper(overrides):
    paper = strategy_file("dflash")
    del paper["with"]
    assert parse_config(make("strategy=dflash", *overrides)).strategy == paper


@pytest.fixture
def own(tmp_path):
    """compose(*overrides) → the configuration of a strategy outside the package, with that `with:`."""

    def composed(entries: str, *overrides: str) -> TrainConfig:
        for name in ("strategy", "experiment"):
            (tmp_path / name).mkdir()
        (tmp_path / "strategy" / "own.yaml").write_text(f"name: own\nsize: 9\n{entries}")
        (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptimizer: {lr: 2}\nstrategy: {size: 2}\n")
        register_conditions(tmp_path)
        return parse_config(make("strategy=own", *overrides, f"hydra.searchpath=[file://{tmp_path}]"))

    yield composed
    for group in ("with_target", "with_experiment"):
        for name in [name for name in ConfigStore.instance().repo[group] if name.startswith("own-")]:
            del ConfigStore.instance().repo[group][name]


TARGET = "with:\n  target=smollm2: {strategy: {size: 1}, optimizer: {lr: 1}}\n"
EXPERIMENT = "  experiment=mine: {strategy: {size: 3}}\n"


@pytest.mark.parametrize(
    ("entries", "overrides", "size", "lr"),
    [
        ("", ["experiment=tiny"], 9, 5e-3),  # none of its own: the experiment's
        (TARGET, [], 1, 1),
        (TARGET, ["target=tiny"], 9, 5e-4),  # for another target
        (TARGET, ["experiment=mine"], 2, 2),  # the experiment comes after the target
        (TARGET + EXPERIMENT, ["experiment=mine"], 3, 2),  # what the strategy needs in it comes after the experiment
        (TARGET + EXPERIMENT, ["experiment=mine", "strategy.size=4", "optimizer.lr=4"], 4, 4),  # the command line wins
    ],
)
def test_the_more_special_setting_wins(own, entries, overrides, size, lr):
    config = own(entries, *overrides)
    assert (config.strategy, config.optimizer.lr) == ({"name": "own", "size": size}, lr)


def test_with_another_group_is_refused(own):
    with pytest.raises(UserError, match=r"own\.yaml: with: data=tiny: an entry is target=NAME or experiment=NAME"):
        own("with:\n  data=tiny: {optimizer: {lr: 1}}\n")


def test_settings_are_plain_containers():
    settings = asdict(parse_config(make("store=shared_dir", "store.secret_file=secret.txt")))
    assert json.loads(json.dumps(settings))["store"]["secret_file"] == "secret.txt"


def test_a_missing_value_is_named():
    with pytest.raises(UserError, match=r"no value for target\.path: set it on the command line"):
        parse_config(make("target=hf"))


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

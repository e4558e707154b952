"""Every shipped configuration composes into the typed schema."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lightning_dataflow.app.command import plain_settings, typed
from lightning_dataflow.app.ranks import num_processes
from lightning_dataflow.app.schema import TrainConfig, register_schemas
from lightning_dataflow.app.topologies import CONTROLS, STORES, watermarks
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
    config = typed(make(f"{group}={name}", "++target.path=folder"))
    assert isinstance(config, TrainConfig)


@pytest.mark.parametrize(("topology", "experiment"), list(product(GROUPS["topology"], GROUPS["experiment"])))
def test_experiments_compose_with_every_topology(topology, experiment):
    config = typed(make(f"topology={topology}", f"experiment={experiment}"))
    assert config.topology.name == topology
    assert config.store.kind in STORES[topology]
    assert config.control.kind in CONTROLS[topology]


@pytest.mark.parametrize(("strategy", "experiment"), list(product(GROUPS["strategy"], GROUPS["experiment"])))
def test_an_experiment_has_settings_of_its_own_for_each_strategy(strategy, experiment):
    plain = typed(make(f"strategy={strategy}", "sizes=paper"))
    config = typed(make(f"strategy={strategy}", f"experiment={experiment}"))
    assert config.strategy["name"] == strategy
    assert config.strategy.keys() == plain.strategy.keys()  # no setting of another strategy
    assert dict(config.strategy) != dict(plain.strategy)
    assert (
        typed(make(f"strategy={strategy}", f"experiment={experiment}", "strategy.target_dtype=x")).strategy["target_dtype"]
        == "x"
    )


def recipe_settings(recipe: str) -> list[list[str]]:
    """The settings of every train.py and lightning-dataflow command of a recipe that CI cannot run."""
    text = (CONF.parent / "recipes" / recipe / "README.md").read_text()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    *before, last = re.split(r'(RUN="[^"]*")', blocks)
    commands, shared = [], ""
    for block in (*before, last):
        if block.startswith('RUN="'):
            shared = " ".join(block[5:-1].split())
        lines = re.sub(r"""'"\$RUN"'|\$RUN""", shared, block).splitlines()
        commands += [line for line in lines if "train.py " in line or line.startswith("lightning-dataflow ")]
    settings = [re.findall(r"(?<=\s)[a-z][\w.]*=[^\s'&]+", line) for line in commands]
    return [[re.sub(r"\$\(.*|\$[\w{}]+", "10.0.0.9", one) for one in found] for found in settings]


@pytest.mark.parametrize("strategy", GROUPS["strategy"])
def test_the_commands_of_the_recipe_for_clusters(strategy):
    commands = recipe_settings("clusters")
    assert [next(one for one in settings if one.startswith("role=")) for settings in commands] == [
        *("role=producer", "role=trainer", "role=trainer", "role=producer", "role=trainer")
    ]
    for settings in commands:
        settings = [f"strategy={strategy}" if one.startswith("strategy=") else one for one in settings]
        config = typed(make(*settings))
        assert (config.channel.kind, config.control.kind) == ("redis", "redis")
        data, ranks = config.data, num_processes(config.trainer)
        assert data.global_batch_size % ranks == 0
        if "role=trainer" in settings:
            assert ranks in (8, 16, 24)


@pytest.mark.parametrize("strategy", GROUPS["strategy"])
def test_the_commands_of_the_recipe_for_8_gpus(strategy):
    commands = recipe_settings("qwen3_8b")
    assert len(commands) == 7
    for settings in commands:
        settings = [f"strategy={strategy}" if one.startswith("strategy=") else one for one in settings]
        config = typed(make(*settings))
        data, devices = config.data, config.trainer["devices"]
        assert data.global_batch_size % (devices * data.micro_batch_size) == 0
        assert devices <= 7
        if config.topology.name == "disagg_online":
            most = data.global_batch_size * data.max_length * (6 * 4096 * 2 + 9)
            watermarks(config.topology, config.store).check_window(data.global_batch_size, 2 * most)


@pytest.mark.parametrize("strategy", GROUPS["strategy"])
def test_another_target_needs_its_path_and_gets_the_sizes_of_the_papers(strategy):
    with pytest.raises(UserError, match=r"no value for target\.path: set it on the command line"):
        typed(make("target=hf"))
    paper = typed(make(f"strategy={strategy}", "sizes=paper")).strategy
    assert typed(make(f"strategy={strategy}", "target=hf", "target.path=folder")).strategy == paper


@pytest.mark.parametrize("strategy", GROUPS["strategy"])
def test_the_sizes_of_a_draft_follow_from_its_target(strategy):
    paper = typed(make(f"strategy={strategy}", "sizes=paper")).strategy
    small = typed(make(f"strategy={strategy}")).strategy
    assert small != paper
    assert typed(make(f"strategy={strategy}", "experiment=quickstart")).strategy == small
    assert typed(make(f"strategy={strategy}", "target=tiny")).strategy == paper


def test_settings_are_plain_containers():
    settings = plain_settings(make("store=shared_dir", "store.secret_file=secret.txt"))
    assert json.loads(json.dumps(settings))["store"]["secret_file"] == "secret.txt"


def test_a_missing_value_is_named():
    with pytest.raises(UserError, match=r"no value for data\.path: set it on the command line"):
        typed(make("data.path=???"))


def test_numbers_in_yaml_are_numbers():
    assert typed(make("optimizer.lr=1e-4")).optimizer.lr == 1e-4


@pytest.mark.parametrize("override", ["evaluate.vllm_args={max_model_len: 64}", "+evaluate.vllm_args.max_model_len=64"])
def test_arguments_of_vllm_as_the_documentation_gives_them(override):
    """Composed as the command does, where keys that are not there yet are refused."""
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_dataflow.conf", version_base="1.3"):
        config = compose("train", ["experiment=tiny", override])
    assert config.evaluate.vllm_args == {"max_model_len": 64}

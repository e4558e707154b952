"""Commands of recipes and docs that CI cannot run: bash runs each page, programs that take down what they get stand in."""

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_dataflow.config.rules import watermarks
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.ranks import num_processes
from lightning_dataflow.services.mooncake import find_program
from lightning_dataflow.services.redis import PROGRAM
from lightning_dataflow.services.sglang import LAUNCHER
from lightning_dataflow.sglang_plugin.wire import SERVER_FILE, server_command
from lightning_dataflow.stores.mooncake.library import TRANSFER_SETTINGS
from lightning_dataflow.strategies.registry import resolve_strategy
from tests.processes import ROOT
from tests.unit.config.test_config import GROUPS, make, parse_config

pytestmark = pytest.mark.integration

PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *ROOT.glob("recipes/*/README.md"), *ROOT.glob("docs/*.md"))
    if "```sh\n" in page.read_text()
)
SECRETS = {name: f"not-to-be-seen-{name}" for name in ("redis.key", "sglang.key", "key.txt")}
PROGRAMS = (
    *("python", "torchrun", "lightning-dataflow", "mooncake_master", "mooncake_client", PROGRAM, "srun"),
    *("scontrol", "hostname", "pip", "hf", "vllm", "sleep"),
)
STAND_IN = """#!{python} -SE
import json, os, sys, time
program, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
call = dict(program=program, arguments=arguments, variables=dict(os.environ), text="")
if program != "srun":  # whose command reads it
    call["text"] = sys.stdin.read()
with open(f"{calls}/{{time.time_ns()}}-{{os.getpid()}}", "w") as file:
    json.dump(call, file)
if program == "srun":
    command = [index for index, one in enumerate(arguments) if not one.startswith("--")][0]
    os.environ["STEP"] = json.dumps(arguments[:command])
    os.execvp(arguments[command], arguments[command:])
print({{"scontrol": "node0\\nnode1\\nnode2\\nnode3", "hostname": "10.0.0.9"}}.get(program, ""))
"""


@dataclass(frozen=True, kw_only=True)
class Call:
    """How bash started a program.

    Attributes:
        text: its standard input.
    """

    program: str
    arguments: list[str]
    variables: dict[str, str]
    text: str

    @property
    def flags(self) -> dict[str, list[str]]:
        """Values by flag, of `--name=value` and `--name value …`; settings are none."""
        found: dict[str, list[str]] = {}
        name = None
        for argument in self.arguments:
            if argument.startswith("--"):
                name, equals, value = argument.partition("=")
                found[name] = [value] if equals else []
                name = None if equals else name
            elif name is not None and not re.match(r"[a-z][\w.]*=", argument):
                found[name].append(argument)
        return found

    @property
    def settings(self) -> list[str]:
        """Hydra's."""
        return [argument for argument in self.arguments if re.match(r"[a-z][\w.]*=", argument)]

    @property
    def step(self) -> dict[str, int]:
        """The numbers that srun got, if it started this."""
        options = dict(one[2:].partition("=")[::2] for one in json.loads(self.variables.get("STEP", "[]")))
        return {name: int(value) for name, value in options.items() if value.isdigit()}

    @property
    def trains(self) -> bool:
        """Whether it is train.py with settings that compose with the shipped ones alone."""
        return (
            self.program != "srun"
            and "train.py" in self.arguments
            and not any(one.startswith("--config-dir") for one in self.arguments)
        )


@functools.cache
def calls(page: str) -> list[Call]:
    """All commands of a page, in one shell; fails on what bash does not take or find."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("bin", "calls", "work"):
            (folder / part).mkdir()
        for program in PROGRAMS:
            (folder / "bin" / program).write_text(STAND_IN.format(python=sys.executable, calls=folder / "calls"))
            (folder / "bin" / program).chmod(0o700)
        for program in ("bash", "cat"):
            (folder / "bin" / program).symlink_to(str(shutil.which(program)))
        for file, secret in SECRETS.items():
            (folder / "work" / file).write_text(f"{secret}\n")
        blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
        run = subprocess.run(
            ["bash", "-u", "-c", "\n".join([*blocks, "wait"])],
            cwd=folder / "work",
            env={"PATH": str(folder / "bin"), "SLURM_JOB_NODELIST": "node[0-3]", "SLURM_JOB_ID": "7"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (run.returncode, run.stderr) == (0, "")
        return [Call(**json.loads(file.read_text())) for file in sorted((folder / "calls").iterdir())]


@functools.cache
def composed(*settings: str) -> TrainConfig:
    return parse_config(make(*settings))


def called(*programs: str) -> list[Call]:
    """Calls of a program on any page."""
    return [call for page in PAGES for call in calls(page) if call.program in programs]


def roles(trained: list[Call]) -> Counter[str]:
    return Counter(next((one for one in call.settings if one.startswith("role=")), "role=auto") for call in trained)


@pytest.mark.integration
@pytest.mark.parametrize("page", PAGES)
def test_bash_takes_every_block(page):
    assert calls(page)


@pytest.mark.parametrize("page", PAGES)
def test_no_command_shows_a_key(page):
    for call in calls(page):
        shown = " ".join([*call.arguments, *call.variables.values()])
        assert not [secret for secret in SECRETS.values() if secret in shown], call.arguments
        assert not call.flags.keys() & {"--api-key", "--requirepass"}


@pytest.mark.integration
@pytest.mark.parametrize("page", PAGES)
def test_settings_compose_and_batches_fit_their_ranks(page):
    for call in calls(page):
        if call.arguments[:1] in (["evaluate"], ["show-mask"]):
            composed(*call.settings)
        if not call.trains:
            continue
        config = composed(*call.settings)
        data, ranks = config.data, num_processes(config.trainer)
        if config.role == "producer" or ("devices", "auto") in config.trainer.items():
            continue
        assert data.global_batch_size % (ranks * data.micro_batch_size) == 0
        assert call.flags.get("--nproc_per_node") in (None, [str(config.trainer["devices"])])
        assert call.step.get("ntasks", ranks) == ranks
        assert call.step.get("ntasks-per-node", config.trainer["devices"]) == config.trainer["devices"]


@pytest.mark.integration
@pytest.mark.parametrize("page", ["recipes/clusters/README.md", "recipes/qwen3_8b/README.md"])
def test_three_windows_fit_the_store(page):
    """Of whichever strategy captures the most layers."""
    layers = max(len(resolve_strategy(strategy).default_layer_ids(36)) for strategy in GROUPS["strategy"])
    streamed = [call for call in calls(page) if call.trains and "topology=disagg_online" in call.settings]
    assert len(streamed) > 4
    for call in streamed:
        config = composed(*call.settings)
        window = config.data.global_batch_size * config.data.max_length * ((layers + 1) * 4096 * 2 + 9)
        watermarks(config).check_window(config.data.global_batch_size, 3 * window)


def test_the_parts_of_the_recipe_for_8_gpus():
    trained = [call for call in calls("recipes/qwen3_8b/README.md") if call.trains]
    assert roles(trained) == {"role=producer": 2, "role=trainer": 2, "role=auto": 1}
    for call in trained:
        assert composed(*call.settings).trainer["devices"] <= 7


def test_the_parts_of_the_recipe_for_clusters():
    trained = [call for call in calls("recipes/clusters/README.md") if call.trains]
    assert roles(trained) == {"role=producer": 2, "role=trainer": 4}
    for call in trained:
        config = composed(*call.settings)
        assert (config.channel.kind, config.control.kind) == ("redis", "redis")
        where = config.store
        assert where.hostname != "127.0.0.1" or where.client_address is not None, "nobody else could reach it"


def test_a_job_that_is_submitted_again_goes_on():
    jobs = [call for call in calls("recipes/clusters/README.md") if call.trains and call.step]
    assert len(jobs) == 2
    for call in jobs:
        config = composed(*call.settings)
        assert config.ckpt_path == "auto" and "7" not in config.run_name.split("-"), "another run each time"
    (redis,) = [call for call in calls("recipes/clusters/README.md") if call.program == PROGRAM and call.step]
    assert redis.flags["--save"] == [""] and "--appendonly" not in redis.flags, "an earlier job's log would come back"


def test_every_step_of_slurm_says_its_tasks():
    """The job's own SLURM_NTASKS, in the environment, would win over --ntasks-per-node."""
    steps = [call for call in called(*PROGRAMS) if call.step]
    assert len(steps) == 6  # with hostname, in the trainers' step
    for call in steps:
        assert call.step["ntasks"] == call.step["nodes"] * call.step.get("ntasks-per-node", 1)


def test_capture_servers_have_what_capture_needs_and_a_key_on_standard_input():
    captures = "--enable-return-aux-hidden-states"
    started = [call for call in called("python") if SERVER_FILE in call.variables or captures in call.arguments]
    assert len(started) == 10
    layers = {resolve_strategy(strategy).default_layer_ids(36) for strategy in GROUPS["strategy"]}
    for call in started:
        assert SERVER_FILE in call.variables and call.text.strip() in SECRETS.values()
        captured = tuple(map(int, call.flags["--return-aux-hidden-state-layer-ids"]))
        assert captured in layers
        command = server_command(call.flags["--model-path"][0], captured, module=LAUNCHER)
        assert call.arguments[: len(command) - 1] == command[1:]


def flags_of(program: str) -> set[str]:
    """Of one of Mooncake's programs. Skips the test where it is not installed."""
    try:
        shown = subprocess.run([find_program(program), "--helpfull"], capture_output=True, text=True, timeout=60).stdout
    except UserError as error:
        pytest.skip(str(error))
    found = {f"--{name}" for name in re.findall(r"^    -(\w+) \(", shown, re.MULTILINE)}
    assert len(found) > 10
    return found


@pytest.mark.parametrize("program", ["mooncake_master", "mooncake_client"])
def test_mooncake_knows_its_flags(program):
    known, started = flags_of(program), called(program)
    assert len(started) == 6
    for call in started:
        assert call.flags.keys() <= known, call.flags.keys() - known


def test_storage_processes_have_the_transfer_settings():
    for call in called("mooncake_client"):
        assert {name: call.variables.get(name) for name in TRANSFER_SETTINGS} == TRANSFER_SETTINGS


@pytest.mark.parametrize("page", [f"recipes/{name}/README.md" for name in ("clusters", "qwen3_8b", "sglang_qwen3_8b")])
def test_runs_use_what_the_storage_process_offers(page):
    sizes = [call.flags["--global_segment_size"][0] for call in calls(page) if call.program == "mooncake_client"]
    stores = [composed(*call.settings).store for call in calls(page) if call.trains]
    used = {store.capacity_bytes for store in stores if store.address is not None}
    assert used == {int(size.removesuffix("GB")) * 10**9 for size in sizes}


@pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="redis-server is not installed")
def test_redis_knows_its_flags(tmp_path):
    """It names the first one that it does not know: of ours, the one put last."""
    started = called(PROGRAM)
    assert len(started) == 2
    for call in started:
        assert call.text == f"requirepass {SECRETS['redis.key']}\n" and call.arguments[0] == "-"
        run = subprocess.run(
            [PROGRAM, *call.arguments, "--no-such-flag", "1"], input=call.text, capture_output=True, text=True, timeout=60
        )
        assert run.returncode == 1 and "'no-such-flag" in run.stderr, run.stderr


def test_torchrun_knows_its_flags_and_heeds_them():
    from torch.distributed.run import get_args_parser

    started = called("torchrun")
    assert len(started) == 5
    hosts = []
    for call in started:
        options = get_args_parser().parse_args(call.arguments)  # exits at a flag that it does not know
        assert options.training_script == "train.py"
        config = composed(*call.settings)
        assert (options.nproc_per_node, options.nnodes) == (
            str(config.trainer["devices"]),
            str(config.trainer.get("num_nodes") or 1) if options.nnodes != "1:1" else options.nnodes,
        )
        if options.rdzv_backend == "c10d":
            assert options.node_rank == 0 and options.rdzv_id == "none"
            is_host = options.rdzv_endpoint == f"{options.local_addr}:29400"
            assert options.rdzv_conf == f"is_host={int(is_host)}"
            assert options.local_addr in (config.store.hostname, (config.store.client_address or "").partition(":")[0])
            hosts.append(is_host)
    assert sorted(hosts) == [False, True, True]


def test_pages_say_what_a_token_takes():
    for page in ("docs/mooncake.md", "recipes/clusters/README.md"):
        text = (ROOT / page).read_text()
        for strategy in GROUPS["strategy"]:
            spec = resolve_strategy(strategy)
            num_states = len(spec.default_layer_ids(36)) + ("last_hidden_state" in spec.features({}))
            size = num_states * 4096 * 2 + 9
            assert f"{size:,}" in text

"""Typed configuration. `trainer`, `logger` and `callbacks` hold Lightning's classes, by `_target_`."""

from dataclasses import dataclass, field, fields, is_dataclass
from importlib.resources import files
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from lightning_dataflow.config.commands import EvaluateConfig, ShowMaskConfig
from lightning_dataflow.config.conditions import register_conditions
from lightning_dataflow.config.fields import DTYPES, number, one_of

TOPOLOGIES: dict[str, dict[str, tuple[str, ...]]] = {
    "online": {"store": ("memory",), "control": ("noop", "memory")},
    "interleaved": {"store": ("memory",), "control": ("memory",)},
    "offline": {"store": ("shared_dir",), "control": ("noop",)},
    "disagg_online": {"store": ("mooncake", "shared_dir"), "control": ("sqlite", "redis")},
    "disagg_offline": {"store": ("mooncake", "shared_dir"), "control": ("sqlite", "redis")},
}
"""The stores and ledgers that each topology works with."""


@dataclass
class TargetConfig:
    """The target model.

    Attributes:
        engine: what captures features: `hf` in this process, `sglang` on a server that this process starts for itself, or
            `sglang_server` on servers that put them into the run's store.
        path: a Hugging Face folder.
        prepare: write the tiny random target to this folder, unless it exists.
        dtype, device: of `hf`, and of the target that decodes; see HFTargetEngine.
        trust_remote_code: let transformers run Python code in `path`. Servers have a flag of their own, see docs/design.md.
        capture_batch_size: prompts per forward pass while capturing; servers choose their own batches.
        urls: of capture servers, `http://HOST:PORT`; none starts one on this machine.
        api_key_file: a file with the servers' key.
        requests_in_flight: prompts that each server is sent at a time.
        server_python: Python of the environment in which SGLang is installed; null for this one.
        server_args: further flags of an SGLang server that starts here.
    """

    engine: str = one_of("hf", "sglang", "sglang_server", default="hf")
    path: str = MISSING
    prepare: str | None = None
    dtype: str = one_of(*DTYPES, default="auto")
    device: str = "auto"
    trust_remote_code: bool = False
    capture_batch_size: int = number(1, at_least=1)
    urls: list[str] = field(default_factory=list)
    api_key_file: str | None = None
    requests_in_flight: int = number(8, at_least=1)
    server_python: str | None = None
    server_args: list[str] = field(default_factory=list)


@dataclass
class DataConfig:
    """Prompts and batches; see load_prompts and DataFlowDataModule.

    Attributes:
        path: a file, folder, pattern or Hugging Face data set, or a list of those; docs/prompts.md has the formats.
        weights: one for each path; records are taken in these proportions. null reads one path after the other.
        prepare: write synthetic conversations to this file, unless it exists.
        split, config, revision: of a Hugging Face data set.
        chat_template: a Jinja file that replaces the tokenizer's template.
        template_args: further variables of the template, for every rendering, for example `{enable_thinking: false}`.
        turns: `auto` makes one sample of a conversation where one rendering shows all turns as they are served, else one of
            each turn; `all` always one of each turn; `last` of the last turn only.
        date: that chat templates write, YYYY-MM-DD; null for the day on which the run began.
        max_broken: up to this many broken records are left out with a warning; one more ends the run.
        cache: folder of tokenised prompts, which all processes of a machine share; null tokenises in each.
        row_tokens, rows_per_step: pack several samples into one row; see DataFlowDataModule.
        num_passes: with trainer.max_steps=null, passes over all samples.
        prefetch_windows: windows that a thread reads ahead; null for a number that suits the topology.
        skip_ids: a file with the source ids, one per line, of samples not to train on.
    """

    path: Any = MISSING
    weights: list[float] | None = None
    prepare: str | None = None
    format: str = "auto"
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    max_length: int = 512
    num_samples: int | None = number(None, at_least=1)
    num_eval_samples: int = number(0, at_least=0)
    chat_template: str | None = None
    template_args: Any = None
    turns: str = one_of("auto", "all", "last", default="auto")
    date: str | None = None
    max_broken: int = number(0, at_least=0)
    cache: str | None = "${oc.env:XDG_CACHE_HOME,'~/.cache'}/lightning-dataflow/prompts"
    global_batch_size: int = number(8, at_least=1)
    micro_batch_size: int = number(1, at_least=1)
    row_tokens: int | None = None
    rows_per_step: int | None = number(None, at_least=1)
    num_passes: int | None = number(None, at_least=1)
    prefetch_windows: int | None = number(None, at_least=0)
    skip_ids: str | None = None


@dataclass
class StoreConfig:
    """The feature store.

    Attributes:
        root: folder of `shared_dir`; null for `features` in the run folder, captured when training starts.
        secret_file: a file with the secret of `shared_dir`.
        capacity_bytes: null for no limit; with `mooncake`, the size of one that starts here, or this run's share of
            a running one.
        address: of a running Mooncake master, `host:port`; null starts a Mooncake on this machine.
        client_address: of the `mooncake_client` on this machine, for shared memory; null for TCP or RDMA.
        metrics_address: of the master's HTTP port.
        hostname: the name by which other machines reach this one, for TCP and RDMA.
        protocol, rdma_devices: of transfers without client_address.
        zero_copy: false moves tensors with Mooncake's plain calls, which copy once more; the objects are the same.
    """

    kind: str = one_of("memory", "shared_dir", "mooncake")
    root: str | None = None
    secret_file: str | None = None
    capacity_bytes: int | None = number(None, at_least=1)
    address: str | None = None
    client_address: str | None = None
    metrics_address: str | None = None
    hostname: str = "127.0.0.1"
    protocol: str = "tcp"
    rdma_devices: str = ""
    zero_copy: bool = True


@dataclass
class ControlConfig:
    """The ledger."""

    kind: str = one_of("noop", "memory", "sqlite", "redis")


@dataclass
class ChannelConfig:
    """The log of references.

    Attributes:
        path: folder of the log `file` and of the ledger `sqlite`, or of the files of a Redis that starts here.
        address: of a running Redis, `host:port`; null starts one on this machine.
        username: a user of Redis's ACL; null for the default user.
        secret_file: a file with the password.
        tls: encrypt the connection.
        ca_file: with the authorities that sign Redis's certificate; null for the system's.
        cert_file, key_file: this client's certificate and key, where Redis asks for them.
    """

    kind: str = one_of("file", "redis")
    path: str = MISSING
    address: str | None = None
    username: str | None = None
    secret_file: str | None = None
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


@dataclass
class TopologyConfig:
    """Where target and trainer run.

    Attributes:
        features: of `disagg_offline`: folder of captured features; null captures them into the run folder first.
        num_producers: of `disagg_online`: producers that the supervisor starts.
        restarts: how often the supervisor restarts each process that died: a producer, the trainer (from its newest
            checkpoint), or a process of a Mooncake that it started. With 0 the run ends with the error at once, unless
            other producers live.
        release_at: of `disagg_online`. `applied` frees features once their step has run; a resume captures those trained
            after its checkpoint again, at the cost of running the target for them once more. `durable` keeps features until
            a checkpoint holds their step, and writes one early when they take half of high_bytes.
        high_bytes, high_refs: capture pauses before more is in flight; null for 0.8 of store.capacity_bytes.
        low_bytes, low_refs: capture resumes below these; null for three quarters of the high ones.
        lease_s: seconds after which another producer captures a dead one's prompts.
        start_timeout_s: how long processes wait for each other to begin.
        idle_timeout_s: how long a trainer waits for a sample.
    """

    name: str = one_of(*TOPOLOGIES)
    features: str | None = None
    num_producers: int = number(1, at_least=1)
    restarts: int = number(0, at_least=0)
    release_at: str = one_of("applied", "durable", default="applied")
    high_bytes: int | None = number(None, at_least=1)
    high_refs: int = number(4096, at_least=1)
    low_bytes: int | None = number(None, at_least=0)
    low_refs: int | None = number(None, at_least=0)
    lease_s: float = number(30.0, above=0)
    start_timeout_s: float = number(1800.0, at_least=0)
    idle_timeout_s: float = number(600.0, at_least=0)

    @property
    def is_disaggregated(self) -> bool:
        """Whether producers and trainers are processes of their own."""
        return self.name.startswith("disagg_")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule; see DraftModule."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_ratio: float = 0.02
    min_lr_ratio: float = 0.0


@dataclass
class TrainConfig:
    """All settings. Secrets are in files, so that no log, configuration or command line shows them.

    Attributes:
        strategy: `name`, and keyword arguments of that strategy's module. `with` has been applied, see conditions.py.
        ckpt_path: a checkpoint to resume from; `last` for the newest complete one of the run `run_name`; `auto` for the
            same, or a new run if there is none.
        run_name: the run's folder below `runs/`.
        imports: modules that register strategies of your own.
        sweep_metric: what a sweep optimises: `loss`, `acceptance_length`, or a logged metric.
        role: `auto` starts all processes of a run; `trainer` and `producer` are one of them.
        shared_files: files are made as the umask says, for a group that works on a run together; else only their owner may
            read them.
        num_threads: CPU threads of torch in each process; null for torch's default, or for an equal share of the cores
            where the supervisor starts several processes.
    """

    strategy: dict[str, Any] = MISSING
    topology: TopologyConfig = MISSING
    target: TargetConfig = MISSING
    data: DataConfig = MISSING
    store: StoreConfig = MISSING
    control: ControlConfig = MISSING
    channel: ChannelConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    trainer: dict[str, Any] = MISSING
    logger: Any = None
    callbacks: Any = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    show_mask: ShowMaskConfig = field(default_factory=ShowMaskConfig)
    role: str = one_of("auto", "trainer", "producer", default="auto")
    seed: int = number(0, at_least=0, at_most=2**32 - 1)
    shared_files: bool = False
    num_threads: int | None = number(None, at_least=1)
    run_name: str = MISSING
    run_dir: str = MISSING
    ckpt_path: str | None = None
    sweep_metric: str = "loss"
    imports: list[str] = field(default_factory=list)


def register_schemas() -> None:
    """Make the schemas available to the YAML files as `<group>/schema`, and the `with:` entries of shipped strategies."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    for group in fields(TrainConfig):
        if is_dataclass(group.type):
            store.store(group=group.name, name="schema", node=group.type)
    register_conditions(files("lightning_dataflow.conf"))

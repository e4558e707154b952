"""From configuration to objects: one function per part."""

import atexit
import importlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from transformers import PreTrainedTokenizerBase

from lightning_dataflow.callbacks import ResultWriter
from lightning_dataflow.cli.hydra_command import log_once
from lightning_dataflow.config.schema import DataConfig, TrainConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.control import ControlPlane
from lightning_dataflow.data import DataFlowDataModule, FeatureCard, PassOrder, RefSource
from lightning_dataflow.producers import capture_to_folder
from lightning_dataflow.prompts import PromptDataset, load_prompts
from lightning_dataflow.run.claim import claim
from lightning_dataflow.run.streams import control_plane, is_disaggregated, make_source, read_secret, run_id, shared_store
from lightning_dataflow.run.trainer import make_trainer
from lightning_dataflow.stores import FeatureStore
from lightning_dataflow.strategies.module import DraftModule
from lightning_dataflow.strategies.registry import resolve_strategy
from lightning_dataflow.strategies.spec import StrategySpec
from lightning_dataflow.targets import HFTargetEngine, TargetEngine, load_tokenizer
from lightning_dataflow.targets.base import HIDDEN_STATES
from lightning_dataflow.targets.hf import check_dtype
from lightning_dataflow.targets.tiny import write_tiny_conversations, write_tiny_target


class Builder:
    """The parts of a run, each built when it is first asked for.

    Args:
        config: resolved.
        settings: the same as plain containers, for `result.json`.

    Attributes:
        resources: what the process has to close at its end.
    """

    def __init__(self, config: TrainConfig, settings: Mapping[str, Any]):
        self.config = config
        self.settings = settings
        self.resources = ExitStack()
        atexit.register(self.resources.close)  # for those who do not close them before
        log_once()
        _import(config.imports)
        _prepare(config)

    @cached_property
    def spec(self) -> StrategySpec:
        """The strategy's entry in the registry."""
        return resolve_strategy(str(self.config.strategy["name"]))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's."""
        return load_tokenizer(self.config.target.path)

    @cached_property
    def prompts(self) -> tuple[PromptDataset, PromptDataset]:
        """(training, held out)."""
        return read_prompts(self.config.data, self.tokenizer)

    @cached_property
    def target(self) -> TargetEngine:
        """The target that captures features."""
        target = self.config.target
        if target.engine == "sglang_server":
            from lightning_dataflow.run.target import served_target

            return served_target(self)
        if target.engine == "sglang":
            from lightning_dataflow.run.target import local_target

            return local_target(self)
        return HFTargetEngine(
            target.path,
            layer_ids=self.layer_ids,
            features=self.hidden_states,
            dtype=target.dtype,
            device=target.device,
        )

    @cached_property
    def plane(self) -> ControlPlane:
        """The log and the ledger of a disaggregated run."""
        plane = control_plane(self.config)
        self.resources.callback(plane.close)
        return plane

    @cached_property
    def shared_store(self) -> FeatureStore:
        """The store that producers and trainers of a disaggregated run share, as a producer uses it."""
        store = shared_store(self.config, self.plane)
        self.resources.callback(store.close)
        return store

    @cached_property
    def layer_ids(self) -> tuple[int, ...]:
        """Layers to capture."""
        return self.module.layer_ids

    @property
    def hidden_states(self) -> tuple[str, ...]:
        """Hidden states to capture: those that the module, with its settings, reads."""
        return tuple(name for name in HIDDEN_STATES if name in self.module.features)

    @cached_property
    def module(self) -> DraftModule:
        """The LightningModule of the strategy."""
        config = self.config
        arguments = {key: value for key, value in config.strategy.items() if key != "name"}
        optimizer = {key: getattr(config.optimizer, key) for key in vars(config.optimizer)}
        try:
            return self.spec.module(target=config.target.path, seed=config.seed, **arguments, **optimizer)
        except TypeError as error:
            if "keyword argument" not in str(error):
                raise
            raise UserError(f"strategy={self.spec.name}: {str(error).split('() ')[-1]}; see conf/strategy") from error

    @cached_property
    def source(self) -> RefSource:
        """Where references come from, by topology."""
        return make_source(self)

    def check_prompts(self, card: FeatureCard, where: str) -> None:
        """Held-out prompts are told from trained ones by the settings that the capture had."""
        captured_here = self.config.topology.name == "offline" and self._captured_folder() is None
        evaluates = "acceptance" in (self.config.callbacks or {}) and self.config.role != "producer"
        if evaluates:
            self.module.check_features(card)  # another target would tokenise otherwise, and is the better explanation
        if (captured_here or evaluates) and card.prompts_version != self.prompts[0].version:
            raise UserError(
                f"{where} was captured from other prompts than these data.* settings choose: use the settings of "
                "the capture; or another run_name, or callbacks=no_evaluation"
            )

    def offline_folder(self) -> Path:
        """The captured features; where none are given they are captured into the run folder now."""
        given = self._captured_folder()
        if given is not None:
            return Path(given)
        folder = Path(self.config.run_dir) / "features"
        capture_once(self, folder)
        return folder

    def _captured_folder(self) -> str | None:
        return self.config.topology.features if is_disaggregated(self.config) else self.config.store.root

    @cached_property
    def result_writer(self) -> ResultWriter:
        """Writes `result.json` to the run's folder."""
        return ResultWriter(self.config.run_dir, self.settings)

    @cached_property
    def data(self) -> DataFlowDataModule:
        """The LightningDataModule."""
        data = self.config.data
        if data.row_tokens is not None and data.row_tokens < data.max_length:
            raise UserError(
                f"data.max_length={data.max_length} is more than data.row_tokens={data.row_tokens}: a sample might not fit "
                "into a row, so lower the one or raise the other"
            )
        return DataFlowDataModule(
            self.source,
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            row_tokens=data.row_tokens,
            rows_per_step=data.rows_per_step,
            seed=self.config.seed,
            prefetch_windows=data.prefetch_windows,
            run_id=run_id(self.config),
        )

    @cached_property
    def trainer(self) -> L.Trainer:
        """The Trainer, with the arguments that follow from others filled in."""
        return make_trainer(self)

    def evaluation_target(self) -> HFTargetEngine:
        """The target that decodes; the one that captures, if it has the same dtype."""
        dtype = self.config.evaluate.dtype
        check_dtype(dtype, "evaluate.dtype")
        same = self.config.topology.name == "online" and self.config.target.dtype == dtype
        if same and isinstance(self.target, HFTargetEngine):
            return self.target
        return HFTargetEngine(
            self.config.target.path, layer_ids=self.layer_ids, dtype=dtype, device=self.config.target.device
        )


def read_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptDataset, PromptDataset]:
    """(training, held-out) prompts."""
    return load_prompts(
        data.path,
        tokenizer,
        max_length=data.max_length,
        format=data.format,
        split=data.split,
        num_samples=data.num_samples,
        num_eval_samples=data.num_eval_samples,
        chat_template=read_chat_template(data),
    )


def read_chat_template(data: DataConfig) -> str | None:
    """The template that replaces the tokenizer's, if one is given."""
    if data.chat_template is None:
        return None
    try:
        return Path(data.chat_template).read_text()
    except OSError as error:
        raise UserError(f"cannot read data.chat_template={data.chat_template}: {error.strerror}") from error


def capture_once(builder: Builder, folder: Path) -> None:
    """Capture into `folder`, unless that is done; every rank but the first waits for it."""
    from lightning_dataflow.data.offline import is_captured
    from lightning_dataflow.run.ranks import first_rank_does

    def capture() -> None:
        claim(folder, "wait for it, or choose another store.root")
        config, prompts = builder.config, builder.prompts[0]
        order = PassOrder(len(prompts), config.seed)
        capture_to_folder(
            prompts,
            builder.target,
            folder,
            order=[order.locate(seq)[0] for seq in range(len(prompts))],  # the groups that `online` captures
            capture_batch_size=config.target.capture_batch_size,
            capacity_bytes=None if is_disaggregated(config) else config.store.capacity_bytes,
            secret=None if is_disaggregated(config) else read_secret(config.store),
            progress=lambda done, total: print(f"\rcaptured {done}/{total}", end="\n" * (done == total), flush=True),
        )

    first_rank_does(capture, lambda: is_captured(folder), f"features in {folder}")


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"imports=[{name}] cannot be imported ({error}): is it on PYTHONPATH?") from error


def _prepare(config: TrainConfig) -> None:
    for part, write in ((config.target, write_tiny_target), (config.data, write_tiny_conversations)):
        if part.prepare is not None:
            write(part.prepare)

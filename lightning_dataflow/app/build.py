"""From configuration to objects: one function per part."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from transformers import PreTrainedTokenizerBase

from lightning_dataflow.app.schema import DataConfig, StoreConfig, TrainConfig
from lightning_dataflow.callbacks import AcceptanceEvaluation, ResultWriter, RunMetrics, StreamCursor
from lightning_dataflow.contracts import UnknownNameError, UserError
from lightning_dataflow.data import DataFlowDataModule, OfflineSource, PassOrder, RefSource
from lightning_dataflow.producers import OnlineSource, capture_to_folder
from lightning_dataflow.prompts import PromptDataset, load_prompts
from lightning_dataflow.stores import MemoryFeatureStore
from lightning_dataflow.strategies import DraftModule, StrategySpec, resolve_strategy
from lightning_dataflow.targets import HFTargetEngine, load_tokenizer
from lightning_dataflow.targets.hardware import multiplies_bfloat16
from lightning_dataflow.targets.tiny import write_tiny_conversations, write_tiny_target

DERIVED_TRAINER_ARGUMENTS = {
    "max_epochs": "trainer.max_steps, or trainer.max_steps=null data.num_passes=…",
    "limit_train_batches": "trainer.max_steps",
    "accumulate_grad_batches": "data.global_batch_size and data.micro_batch_size",
    "num_sanity_val_steps": "evaluate.every_n_steps",
    "default_root_dir": "run_name",
}


class Builder:
    """The parts of a run, each built when it is first asked for.

    Args:
        config: resolved.
        settings: the same as plain containers, for `result.json`.
    """

    def __init__(self, config: TrainConfig, settings: Mapping[str, Any]):
        self.config = config
        self.settings = settings
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
    def target(self) -> HFTargetEngine:
        """The target that captures features."""
        target = self.config.target
        return HFTargetEngine(target.path, layer_ids=self.layer_ids, dtype=target.dtype, device=target.device)

    @cached_property
    def layer_ids(self) -> tuple[int, ...]:
        """Layers to capture."""
        return self.module.layer_ids

    @cached_property
    def module(self) -> DraftModule:
        """The LightningModule of the strategy."""
        config = self.config
        arguments = {key: value for key, value in config.strategy.items() if key != "name"}
        optimizer = {key: getattr(config.optimizer, key) for key in vars(config.optimizer)}
        try:
            return self.spec.module(target=config.target.path, seed=config.seed, **arguments, **optimizer)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise UserError(f"strategy={self.spec.name}: {str(error).split('() ')[-1]}; see conf/strategy") from error

    @cached_property
    def source(self) -> RefSource:
        """Where references come from, by topology."""
        name, store = self.config.topology.name, self.config.store
        if name == "online":
            if store.kind != "memory":
                raise UserError(f"topology=online keeps features in memory, not in store={store.kind}: use store=memory")
            return OnlineSource(
                self.prompts[0],
                self.target,
                MemoryFeatureStore(store.capacity_bytes),
                capture_batch_size=self.config.target.capture_batch_size,
            )
        if name == "offline":
            if store.kind != "shared_dir":
                raise UserError(f"topology=offline reads files, not store={store.kind}: use store=shared_dir")
            source = OfflineSource(self.offline_folder(), secret=read_secret(store))
            self._check_prompts(source)
            return source
        raise UnknownNameError(f"unknown topology {name!r}: available are offline, online")

    def _check_prompts(self, source: OfflineSource) -> None:
        """Held-out prompts are told from trained ones by the settings that the capture had."""
        captured_here = self.config.store.root is None
        evaluates = "acceptance" in (self.config.callbacks or {})
        if (captured_here or evaluates) and source.card.prompts_version != self.prompts[0].version:
            raise UserError(
                f"{source.folder} was captured from other prompts than these data.* settings choose: use the settings of "
                "the capture; or another run_name, or store.root with callbacks=no_evaluation"
            )

    def offline_folder(self) -> Path:
        """The captured features; without store.root they are captured into the run folder now."""
        if self.config.store.root is not None:
            return Path(self.config.store.root)
        folder = Path(self.config.run_dir) / "features"
        capture_once(self, folder)
        return folder

    @cached_property
    def result_writer(self) -> ResultWriter:
        """Writes `result.json` to the run's folder."""
        return ResultWriter(self.config.run_dir, self.settings)

    @cached_property
    def data(self) -> DataFlowDataModule:
        """The LightningDataModule."""
        data = self.config.data
        return DataFlowDataModule(
            self.source,
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            seed=self.config.seed,
            collate=self.spec.collate,
        )

    @cached_property
    def trainer(self) -> L.Trainer:
        """The Trainer, with the arguments that follow from others filled in."""
        arguments = {key: value for key, value in self.config.trainer.items() if key != "_target_"}
        for name, instead in DERIVED_TRAINER_ARGUMENTS.items():
            if arguments.get(name) is not None:
                raise UserError(f"trainer.{name}={arguments[name]}: this follows from other settings, use {instead}")
        world_size = num_processes(arguments)
        if isinstance(strategy := arguments.get("strategy"), dict):
            arguments["strategy"] = self._trainer_strategy(dict(strategy), world_size)
        if arguments.get("precision") == "auto":
            arguments["precision"] = _auto_precision(arguments)
        accumulation = self.data.accumulate_grad_batches(world_size)
        max_steps = self._max_steps(arguments.pop("max_steps", None))
        if not arguments.get("fast_dev_run"):
            arguments |= {"accumulate_grad_batches": accumulation, "limit_train_batches": max_steps * accumulation}
        logger, callbacks = self._loggers() or False, self._callbacks()
        try:
            return L.Trainer(
                max_steps=max_steps,
                max_epochs=1,
                num_sanity_val_steps=0,
                default_root_dir=self.config.run_dir,
                logger=logger,
                callbacks=callbacks,
                **arguments,
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"trainer: {error}") from error

    def _max_steps(self, max_steps: int | None) -> int:
        data = self.config.data
        if max_steps is not None and data.num_passes is not None:
            raise UserError(
                f"trainer.max_steps={max_steps} and data.num_passes={data.num_passes} both say when training ends: set one "
                "of them to null"
            )
        if max_steps is not None:
            if max_steps < 1:
                raise UserError(f"trainer.max_steps={max_steps}: a stream has no end of its own, give at least 1 step")
            return max_steps
        if data.num_passes is None:
            raise UserError("neither trainer.max_steps nor data.num_passes says when training ends: set one of them")
        steps, left_over = divmod(data.num_passes * len(self.source), data.global_batch_size)
        if left_over:
            print(
                f"{left_over} samples at the end of {data.num_passes} passes over {len(self.source)} fill no step of "
                f"global_batch_size={data.global_batch_size} and are not trained on",
                flush=True,
            )
        if steps < 1:
            raise UserError(
                f"{data.num_passes} passes over {len(self.source)} samples fill no step of global_batch_size="
                f"{data.global_batch_size}: add samples or passes, or lower data.global_batch_size"
            )
        return steps

    def _trainer_strategy(self, arguments: dict[str, Any], world_size: int) -> Any:
        if arguments.get("data_parallel_size") == "auto":
            arguments["data_parallel_size"] = world_size
        if arguments["_target_"].endswith(".FSDPStrategy"):
            if not torch.cuda.is_available():
                raise UserError("trainer=fsdp needs a GPU, this machine has none: use trainer=fsdp2 or trainer=ddp")
            options = {key: value for key, value in arguments.items() if key != "_target_"}
            return FSDPStrategy(auto_wrap_policy={type(self.module.draft)}, **options)
        return hydra.utils.instantiate(arguments, _convert_="all")

    def _loggers(self) -> list[Any]:
        config = self.config.logger or {}
        entries = [config] if "_target_" in config else list(config.values())
        return [hydra.utils.instantiate(entry, _convert_="all") for entry in entries]

    def _callbacks(self) -> list[L.Callback]:
        callbacks: list[L.Callback] = [
            RunMetrics(),  # first, so that it does not time the others
            StreamCursor(),
            self.result_writer,
        ]
        for entry in (self.config.callbacks or {}).values():
            if entry["_target_"].rsplit(".", 1)[-1] == AcceptanceEvaluation.__name__:
                entry = {key: value for key, value in entry.items() if key != "_target_"}
                prompts = [prompt.question for prompt in self.prompts[1]]
                callbacks.append(AcceptanceEvaluation(self.evaluation_target, prompts, **entry))
            else:
                callbacks.append(hydra.utils.instantiate(entry, _convert_="all"))
        return callbacks

    def evaluation_target(self) -> HFTargetEngine:
        """The target that decodes; the one that captures, if it has the same dtype."""
        dtype = self.config.evaluate.dtype
        if self.config.topology.name == "online" and self.config.target.dtype == dtype:
            return self.target
        return HFTargetEngine(
            self.config.target.path, layer_ids=self.layer_ids, dtype=dtype, device=self.config.target.device
        )


def read_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptDataset, PromptDataset]:
    """(training, held-out) prompts."""
    template = None
    if data.chat_template is not None:
        try:
            template = Path(data.chat_template).read_text()
        except OSError as error:
            raise UserError(f"cannot read data.chat_template={data.chat_template}: {error.strerror}") from error
    return load_prompts(
        data.path,
        tokenizer,
        max_length=data.max_length,
        format=data.format,
        split=data.split,
        num_samples=data.num_samples,
        num_eval_samples=data.num_eval_samples,
        chat_template=template,
    )


def read_secret(store: StoreConfig) -> str | None:
    """The content of the secret's file, without white space around it."""
    if store.secret_file is None:
        return None
    try:
        return Path(store.secret_file).read_text().strip()
    except OSError as error:
        raise UserError(f"cannot read store.secret_file={store.secret_file}: {error.strerror}") from error


def num_processes(trainer: Mapping[str, Any]) -> int:
    """World size that these Trainer arguments lead to."""
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes") or 1
    if isinstance(devices, list):
        return len(devices) * nodes
    if isinstance(devices, int) and devices > 0:
        return devices * nodes
    on_gpu = trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
    return (torch.cuda.device_count() if on_gpu else 1) * nodes


def _auto_precision(trainer: Mapping[str, Any]) -> str:
    on_gpu = trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    return "bf16-mixed" if multiplies_bfloat16(device) else "32-true"


def capture_once(builder: Builder, folder: Path) -> None:
    """Capture into `folder`, unless that is done; every rank but the first waits for it."""
    from lightning_dataflow.app.ranks import first_rank_does
    from lightning_dataflow.data.offline import is_captured

    def capture() -> None:
        config, prompts = builder.config, builder.prompts[0]
        order = PassOrder(len(prompts), config.seed)
        capture_to_folder(
            prompts,
            builder.target,
            folder,
            order=[order.locate(seq)[0] for seq in range(len(prompts))],  # the groups that `online` captures
            capture_batch_size=config.target.capture_batch_size,
            capacity_bytes=config.store.capacity_bytes,
            secret=read_secret(config.store),
            progress=lambda done, total: print(f"\rcaptured {done}/{total}", end="\n" * (done == total), flush=True),
        )

    first_rank_does(capture, lambda: is_captured(folder), f"features in {folder}")


def _prepare(config: TrainConfig) -> None:
    for part, write in ((config.target, write_tiny_target), (config.data, write_tiny_conversations)):
        if part.prepare is not None:
            write(part.prepare)

"""From configuration to objects."""

import atexit
import importlib
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import PreTrainedTokenizerBase

from lightning_dataflow.callbacks import ResultWriter, RunMetrics, StreamCursor
from lightning_dataflow.callbacks.progress import PlainProgress
from lightning_dataflow.config.files import read_date, read_file, read_secret, read_skip_ids
from lightning_dataflow.config.run_id import run_id
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.control import ControlPlane
from lightning_dataflow.data import DataFlowDataModule, FeatureCard, OfflineSource, RefSource
from lightning_dataflow.producers import RolloutWorker
from lightning_dataflow.producers.feeds import Feed, FolderFeed, PromptFeed, ServedFeed
from lightning_dataflow.prompts import PromptDataset, load_prompts
from lightning_dataflow.run.captured import capture_once, named_folder
from lightning_dataflow.run.ranks import num_processes
from lightning_dataflow.run.streams import (
    colocated_source,
    control_plane,
    make_workers,
    shared_store,
    store_id,
    streaming_source,
)
from lightning_dataflow.run.target import check_one_engine, local_target, served_target
from lightning_dataflow.run.trainer import EndAtSigterm, count_steps, make_callbacks, make_loggers, make_trainer
from lightning_dataflow.stores import FeatureStore
from lightning_dataflow.strategies.common.head_check import check_head
from lightning_dataflow.strategies.module import DraftModule
from lightning_dataflow.strategies.registry import resolve_strategy
from lightning_dataflow.targets import HFTargetEngine, TargetEngine, load_tokenizer
from lightning_dataflow.targets.base import HIDDEN_STATES
from lightning_dataflow.targets.info import read_eos_token_ids
from lightning_dataflow.targets.tiny import write_tiny_conversations, write_tiny_target


class Builder:
    """The parts of a run, in order; each is made when it is first asked for.

    Args:
        config: checked.

    Attributes:
        resources: what the process has to close when it ends.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.resources = ExitStack()
        atexit.register(self.resources.close)  # for commands that do not close them earlier
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        _pass_on_lightnings_log()
        _import(config.imports)
        if config.target.prepare is not None:
            write_tiny_target(config.target.prepare)
        if config.data.prepare is not None:
            write_tiny_conversations(config.data.prepare)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's."""
        return load_tokenizer(self.config.target.path)

    @cached_property
    def prompts(self) -> tuple[PromptDataset, PromptDataset]:
        """(training, held out)."""
        data = self.config.data
        return load_prompts(
            data.path,
            self.tokenizer,
            max_length=data.max_length,
            format=data.format,
            split=data.split,
            config=data.config,
            revision=data.revision,
            weights=data.weights,
            num_samples=data.num_samples,
            num_eval_samples=data.num_eval_samples,
            turns=data.turns,
            max_broken=data.max_broken,
            cache=data.cache,
            cache_timeout_s=self.config.topology.start_timeout_s,
            **self.rendering,
        )

    @cached_property
    def rendering(self) -> dict[str, Any]:
        """How conversations are rendered: arguments of `load_prompts`, `load_questions` and `ChatTemplate`."""
        data = self.config.data
        return {
            "chat_template": read_file(data.chat_template, "data.chat_template"),
            "template_args": data.template_args,
            "today": self._today(),
            "end_ids": read_eos_token_ids(self.config.target.path),
        }

    def _today(self) -> date:
        """The date that chat templates write. The processes of a disaggregated run agree on it in its log."""
        config = self.config
        today = read_date(config.data.date, Path(config.run_dir))
        if config.data.date is None and config.topology.is_disaggregated and config.role != "auto":
            return self.plane.log.first_day(today)
        return today

    @cached_property
    def module(self) -> DraftModule:
        """The LightningModule of the strategy."""
        config, arguments = self.config, dict(self.config.strategy)
        spec = resolve_strategy(str(arguments.pop("name")))
        try:
            return spec.module(target=config.target.path, seed=config.seed, **arguments, **vars(config.optimizer))
        except TypeError as error:
            if "keyword argument" not in str(error):
                raise
            raise UserError(f"strategy={spec.name}: {str(error).split('() ')[-1]}; see conf/strategy") from error

    @cached_property
    def plane(self) -> ControlPlane:
        """The log and the ledger of a disaggregated run."""
        return self.resources.enter_context(closing(control_plane(self.config)))

    @cached_property
    def shared_store(self) -> FeatureStore:
        """The store that producers and trainers of a disaggregated run share, as a producer uses it."""
        return self.resources.enter_context(closing(shared_store(self.config, self.plane)))

    @cached_property
    def target(self) -> TargetEngine:
        """The target that captures what the module, with its settings, reads."""
        target, module = self.config.target, self.module
        features = tuple(name for name in HIDDEN_STATES if name in module.features)
        capture: dict[str, Any] = {"layer_ids": module.layer_ids, "features": features}
        if target.engine == "sglang_server":
            return served_target(self.config, self.shared_store, store_id(self.plane), self.resources, **capture)
        if target.engine == "sglang":
            return local_target(self.config, self.resources, **capture)
        return self._load_target(target.dtype, **capture)

    def _load_target(self, dtype: str, **capture: Any) -> HFTargetEngine:
        """The target in this process, once its logits are those that drafts are trained on."""
        engine = HFTargetEngine(self.config.target.path, dtype=dtype, device=self.config.target.device, **capture)
        check_head(engine)
        return engine

    def workers(self, name: str) -> list[RolloutWorker]:
        """The producers of this process."""
        return make_workers(name, self.config, self.plane, lambda: (self._make_feed(), self.shared_store), self.resources)

    def _make_feed(self) -> Feed:
        """What producers put into the store."""
        config, name = self.config, run_id(self.config.run_name)
        if config.topology.name == "disagg_offline":
            source = OfflineSource(self._offline_folder())
            return FolderFeed(source, vocab_size=self.module.target_info.vocab_size, run_id=name)
        kind: Any = ServedFeed if config.target.engine == "sglang_server" else PromptFeed
        return kind(self.prompts[0], self.target, seed=config.seed, run_id=name)

    @cached_property
    def source(self) -> RefSource:
        """Where the trainer's references come from, by topology."""
        if self.config.topology.is_disaggregated:
            streaming = streaming_source(self.config, self.plane)
            self._check_prompts(streaming.card, streaming.plane.log.name)
            return streaming
        if self.config.topology.name == "offline":
            offline = OfflineSource(self._offline_folder(), secret=read_secret(self.config.store))
            self._check_prompts(offline.card, str(offline.folder))
            return offline
        check_one_engine(self.config)
        return colocated_source(self.config, self.prompts[0], self.target)

    def _offline_folder(self) -> Path:
        """The captured features; where none are given they are captured into the run folder now."""
        if (given := named_folder(self.config)) is not None:
            return Path(given)
        folder = Path(self.config.run_dir) / "features"
        self.capture_once(folder)
        return folder

    def capture_once(self, folder: Path) -> None:
        """Capture into `folder`, unless that is done; every rank but the first waits for it."""
        capture_once(self.config, folder, lambda: (self.prompts[0], self.target))

    def _check_prompts(self, card: FeatureCard, where: str) -> None:
        """Held-out prompts are told from trained ones by the settings of the capture, so they must be the same now."""
        captured_here = self.config.topology.name == "offline" and named_folder(self.config) is None
        evaluates = "acceptance" in (self.config.callbacks or {}) and self.config.role != "producer"
        if evaluates:
            self.module.check_features(card)  # another target tokenises otherwise, and is the better explanation
        if (captured_here or evaluates) and card.prompts_version != self.prompts[0].version:
            raise UserError(
                f"{where} was captured from other prompts than these data.* settings choose: use the settings of "
                "the capture, also data.date=YYYY-MM-DD if the chat template writes the date; or another run_name, or "
                "callbacks=no_evaluation"
            )

    @cached_property
    def data(self) -> DataFlowDataModule:
        """The LightningDataModule."""
        data = self.config.data
        return DataFlowDataModule(
            self.source,
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            row_tokens=data.row_tokens,
            rows_per_step=data.rows_per_step,
            seed=self.config.seed,
            prefetch_windows=data.prefetch_windows,
            run_id=run_id(self.config.run_name),
            skip_ids=read_skip_ids(data.skip_ids),
        )

    @cached_property
    def result_writer(self) -> ResultWriter:
        """Writes `result.json`, with the settings: they hold no secrets, only the names of files that do."""
        return ResultWriter(self.config.run_dir, asdict(self.config))

    @cached_property
    def trainer(self) -> L.Trainer:
        """The Trainer, with loggers, callbacks and the arguments that follow from others."""
        config = self.config
        callbacks = [
            EndAtSigterm(),
            RunMetrics(),  # before the others, so that it does not time them
            StreamCursor(),
            self.result_writer,
            PlainProgress(),
            *make_callbacks(config.callbacks, self._acceptance_arguments),
        ]
        return make_trainer(
            config.trainer,
            draft=self.module.draft,
            max_steps=count_steps(config.data, len(self.source), config.trainer.get("max_steps")),
            accumulation=self.data.accumulate_grad_batches(num_processes(config.trainer)),
            default_root_dir=config.run_dir,
            logger=make_loggers(config.logger),
            callbacks=callbacks,
        )

    @cached_property
    def evaluation_target(self) -> HFTargetEngine:
        """The target that decodes, once its capture layers are set; the one that captures, if it has the same dtype."""
        target, dtype = self.config.target, self.config.evaluate.dtype
        same = self.config.topology.name == "online" and target.dtype == dtype
        if same and isinstance(self.target, HFTargetEngine):
            return self.target
        return self._load_target(dtype)

    def _acceptance_arguments(self) -> tuple[Callable[[], HFTargetEngine], list[Sequence[int]]]:
        return lambda: self.evaluation_target, [prompt.question for prompt in self.prompts[1]]


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"imports=[{name}] cannot be imported ({error}): is it on PYTHONPATH?") from error


def _pass_on_lightnings_log() -> None:
    """Lightning installs handlers of its own when it is imported; without them its messages reach Hydra's, once."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True

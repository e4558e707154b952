"""What every strategy's LightningModule shares: the gradient of the global quotient, the optimizer, sharding, results."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dataflow.callbacks.averaging import complete_average, end_averages, follow_buffers
from lightning_dataflow.callbacks.defaults import default_callbacks
from lightning_dataflow.checkpoints.paths import forget_foreign_paths
from lightning_dataflow.contracts import NotFiniteError, StepContext, UserError
from lightning_dataflow.data import DataFlowDataModule, FeatureCard
from lightning_dataflow.data.collate import Batch, SampleRows
from lightning_dataflow.data.finite import first_not_finite
from lightning_dataflow.evaluation import Drafter
from lightning_dataflow.strategies.common.sums import ObjectiveSums
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.strategies.features import check_features
from lightning_dataflow.strategies.finite import NumberCheck
from lightning_dataflow.strategies.optimisation import adamw, scale_gradients, warmup_cosine
from lightning_dataflow.strategies.published.reading import read_draft
from lightning_dataflow.strategies.registry import resolve_strategy
from lightning_dataflow.strategies.sharding import fsdp1_root, full_state_dict, shard_draft
from lightning_dataflow.strategies.spec import StrategySpec
from lightning_dataflow.strategies.streaming import align_loops, check_averaging, check_trainer
from lightning_dataflow.strategies.warm_start import check_settings, check_start, choose_layers, load_start
from lightning_dataflow.strategies.window import WindowSums
from lightning_dataflow.targets.info import read_target_info, tensor_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DraftModule(L.LightningModule):
    """Trains a draft of one frozen target.

    The gradient is that of Σ numerators / Σ denominators over all micro-batches and ranks of an optimizer step, whatever
    the batch is cut into. The denominator D is unknown at the first backward pass, so `training_step` returns
    numerator · W · A / P (W ranks and A micro-batches, which Lightning divides by, P the window's tokens), and
    `on_before_optimizer_step`, which runs before clipping, multiplies the gradients by P / D.

    A loss or gradient norm that is not finite ends the fit on every rank before the weights change. Weights that are not
    finite are not saved. Both raise NotFiniteError. Under `16-mixed` precision the gradient's is left to the
    GradScaler: it has unscaled gradients by then, and skips the steps that overflow, which is how it finds its scale.

    Subclasses set `strategy_name`, build `self.draft` in their constructor, and implement `collate`, `objective` and
    `drafter`; `packs` says that these heed where samples begin in a row. A constructor names its own arguments and passes
    the others on as `**options`: LightningCLI finds them by reading the calls of `super().__init__`, and all are in
    `hparams`.

    Args:
        target: the target's Hugging Face folder. Only its sizes, embedding and head are read.
        layer_ids: target layers whose features the draft reads; None for the strategy's default.
        init_from: folder of a published draft of this target to start from, for SGLang or vLLM; its sizes are the draft's.
        network: sizes of the draft by their names in its configuration, in place of what settings and target say.
        target_dtype: of the frozen embedding and head, `float32` or `bfloat16`.
        lr, betas, weight_decay: of AdamW.
        warmup_ratio, min_lr_ratio: warm-up as a share of max_steps, final learning rate as a share of `lr`.
        seed: of the draft's initial weights, which do not depend on the global random state.
    """

    strategy_name: ClassVar[str]
    packs: ClassVar[bool] = False
    draft: nn.Module

    def __init__(
        self,
        target: str,
        layer_ids: list[int] | None = None,
        init_from: str | None = None,
        network: dict[str, Any] | None = None,
        target_dtype: str = "float32",
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.02,
        min_lr_ratio: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()  # of the subclasses' constructors too, which have not returned
        if target_dtype not in DTYPES:
            raise UserError(f"target_dtype={target_dtype} is unknown: use {' or '.join(DTYPES)}")
        self.target_info = read_target_info(target)
        self._start = None if init_from is None else read_draft(init_from)
        if self._start is not None:
            check_start(self._start, self.strategy_name, self.target_info)
            layer_ids = choose_layers(self._start, layer_ids)
            self.hparams.update(network=dict(self._start.network), layer_ids=layer_ids)  # checkpoints need no folder
        self.layer_ids = tuple(layer_ids or self.spec.default_layer_ids(self.target_info.num_layers))
        self.step_losses: list[Tensor | float] = []
        self._frozen: FrozenTarget | None = None
        self._window = WindowSums()
        self._window_tokens = 0
        self._numbers = NumberCheck()
        self._initialised = False  # whether the draft's weights are somebody's work
        self._trained: dict[str, Tensor] | None = None  # at the end of training, where an average has taken their place

    @property
    def spec(self) -> StrategySpec:
        """This strategy's entry in the registry."""
        return resolve_strategy(self.strategy_name)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that `collate` reads with these settings."""
        return self.spec.features(self.hparams)

    @property
    @abstractmethod
    def num_draft_tokens(self) -> int:
        """How many tokens the draft is trained to propose at a time."""

    @property
    def failure(self) -> NotFiniteError | None:
        """What ended the last fit, if a number was not finite. Nothing is saved until another fit starts."""
        return self._numbers.failure

    @property
    def frozen_target(self) -> FrozenTarget:
        """The target's embedding and head."""
        assert self._frozen is not None, "load_frozen_target comes first"
        return self._frozen

    @abstractmethod
    def collate(self, rows: SampleRows) -> Batch:
        """The batch that `objective` reads; called by the thread that reads ahead, so on the CPU."""

    @abstractmethod
    def objective(self, batch: Batch, context: StepContext) -> ObjectiveSums:
        """Sums of one micro-batch."""

    @abstractmethod
    def drafter(self, *, num_draft_tokens: int) -> Drafter:
        """The draft as it stands, ready to decode. A collective under sharding: every rank calls it."""

    def full_draft_state(self) -> dict[str, Tensor]:
        """The unsharded state dict of the draft on every rank. A collective under sharding."""
        root = fsdp1_root(self.trainer.strategy.model) if self._trainer is not None else None
        return full_state_dict(root or self, "draft.")

    def check_data(self, data: DataFlowDataModule) -> None:
        """Raise UserError when this draft cannot be trained on the data; called before every fit."""

    def initialise_draft(self, data: DataFlowDataModule) -> None:
        """Set what depends on the target's tensors or on the data, once before a new draft trains."""

    def network_sizes(self, defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes of the draft's network: what a draft to start from has, else settings that are not None, else defaults.
        Raises UserError when settings and the draft to start from differ."""
        if self._start is not None:
            check_settings(self._start, settings)
        chosen = {name: value for name, value in settings.items() if value is not None}
        return {**defaults, **chosen, **(self.hparams["network"] or {})}

    def load_start(self) -> None:
        """Take over the weights of the draft to start from; done by the first fit."""
        export = self.spec.export
        assert self._start is not None and export is not None, "nothing to start from"
        load_start(self._start, export, self.draft, self.frozen_target)
        self._initialised = True

    def derived_metrics(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Further metrics, computed from the step's means."""
        return {}

    def load_frozen_target(self, device: torch.device) -> None:
        """Read the target's embedding and head, unless that is done."""
        if self._frozen is None:
            info, dtype = self.target_info, DTYPES[self.hparams["target_dtype"]]
            embedding_names, head_names = tensor_names(info.path)
            self._frozen = FrozenTarget.load(
                info.path,
                dtype=dtype,
                tied=info.tie_word_embeddings,
                embedding_names=embedding_names,
                head_names=head_names,
            )
            if first_not_finite({"head": self._frozen.head}):
                raise NotFiniteError(f"the head of {info.path} holds NaN or infinity: check the target's files")
        self._frozen.to(device)

    def setup(self, stage: str) -> None:
        """Lightning's hook: refuse features of another target, then initialise the draft."""
        self.load_frozen_target(self.trainer.strategy.root_device)
        if stage == "fit" and isinstance(data := self._data(), DataFlowDataModule):
            if data.batching.packed and not self.packs:
                raise UserError(f"{self.strategy_name} does not pack samples: leave row_tokens and rows_per_step out")
            self.check_features(data.source.card)
            if data.batching.row_tokens is not None and data.batching.row_tokens < data.source.card.max_num_tokens:
                raise UserError(
                    f"row_tokens={data.batching.row_tokens} is less than the {data.source.card.max_num_tokens} tokens of "
                    "the longest sample: raise it, or cut samples to a smaller max_length"
                )
            self.check_data(data)
            if not self._initialised and self._start is not None:
                self.load_start()
            elif not self._initialised:
                self.initialise_draft(data)
                self._initialised = True
            follow_buffers(self.trainer)

    def check_features(self, card: FeatureCard) -> None:
        """Raise UserError naming the first way in which features do not fit this draft."""
        check_features(card, self.strategy_name, self.features, self.target_info, self.layer_ids)

    def configure_model(self) -> None:
        """Lightning's hook: shard under ModelParallelStrategy; other strategies wrap the module themselves."""
        if self.device_mesh is not None:
            shard_draft(self.draft, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[L.Callback]:
        """Lightning's hook: the callbacks that a run needs, except those whose class the user passed."""
        if self.trainer.state.fn == "fit":
            check_averaging(self.trainer)
        return default_callbacks(self.trainer)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Lightning's hook: AdamW, warm-up and cosine over the trainer's max_steps."""
        hparams = self.hparams
        optimizer = adamw(
            self.named_parameters(), lr=hparams["lr"], betas=tuple(hparams["betas"]), weight_decay=hparams["weight_decay"]
        )
        schedule = warmup_cosine(
            optimizer,
            warmup_ratio=hparams["warmup_ratio"],
            min_lr_ratio=hparams["min_lr_ratio"],
            total_steps=self.trainer.max_steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def on_fit_start(self) -> None:
        self._numbers = NumberCheck()
        check_trainer(self.trainer)

    def on_train_start(self) -> None:
        """Lightning's hook. What an earlier, interrupted fit left behind is no part of this one."""
        self._window = WindowSums()
        self._trained = None
        self.step_losses = self.step_losses[: self.trainer.global_step]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Lightning's hook; see the class for the scale of what it returns."""
        trainer = self.trainer
        total_steps = trainer.max_steps if trainer.max_steps > 0 else None
        sums = self.objective(batch, StepContext(global_step=trainer.global_step, total_steps=total_steps))
        self._window.add(sums)
        self._window_tokens = batch["window_num_tokens"]
        self._numbers.add(batch, self._data().next_seq)
        return sums.loss.numerator * (trainer.world_size * trainer.accumulate_grad_batches / self._window_tokens)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Lightning's hook: reduce the window's sums once, scale the gradients, log the means."""
        means, denominator, norm = self._window.reduce(
            self.trainer.strategy.reduce, self._numbers.norm(self.parameters(), self.trainer)
        )
        factor = torch.where(denominator > 0, self._window_tokens / denominator.clamp(min=1e-12), 0)
        self._numbers.check_step(means["loss"], norm * factor, self.trainer)
        scale_gradients(self.parameters(), factor)
        self.step_losses.append(means["loss"])
        self._log_means(means)

    def check_weights(self) -> None:
        """Raise NotFiniteError on every rank if such an error has ended the fit, or if a weight of the draft is NaN or
        infinity. A collective."""
        self._numbers.check_weights(self.draft, self.trainer)

    def on_train_epoch_end(self) -> None:
        """Lightning's hook. No loss is computed after the last step, and an average takes the draft's place next."""
        self.check_weights()
        self._trained = end_averages(self.trainer, self)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's hook; FSDP1 clips by norm through its root, which Lightning itself refuses."""
        root = fsdp1_root(self.trainer.strategy.model)
        if root is not None and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            root.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: losses so far travel with the weights. Raises NotFiniteError; see `check_weights`."""
        self.check_weights()
        self.step_losses = [float(loss) for loss in self.step_losses]
        checkpoint["step_losses"] = self.step_losses
        checkpoint["strategy"] = self.strategy_name
        checkpoint["target_model_version"] = self.target_info.model_version
        checkpoint["identity"] = self.identity()
        complete_average(checkpoint, self._trained)
        if "optimizer_states" not in checkpoint and isinstance(data := self._data(), DataFlowDataModule):
            data.forget_saved()  # weights alone: nothing resumes from them

    def identity(self) -> dict[str, Any]:
        """What a draft must share with a checkpoint to go on from it, by the names that an error shows."""
        config = getattr(self.draft, "config", None)
        sizes = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
        return {
            "strategy": self.strategy_name,
            "target weights": self.target_info.model_version,
            "tokenizer": self.target_info.tokenizer_version,
            "capture layers": list(self.layer_ids),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()},
        }

    def check_checkpoint(self, checkpoint: Mapping[str, Any], data: Any) -> None:
        """Raise UserError naming the first way in which a checkpoint is of another training than this module and data."""
        saved = checkpoint.get("identity", {})
        for name, value in self.identity().items():
            if saved.get(name) != value:
                raise UserError(
                    f"the checkpoint is of a draft with {name}={saved.get(name)}, this one has {value}: resume with the "
                    "settings that it was written with, or start a new run"
                )
        if isinstance(data, DataFlowDataModule):
            data.check_state(checkpoint.get(type(data).__qualname__, {}))

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self.check_checkpoint(checkpoint, self._data())
            forget_foreign_paths(self.trainer.checkpoint_callbacks, checkpoint.get("callbacks", {}))
            weights = {**checkpoint.get("state_dict", {}), **checkpoint.get("current_model_state", {})}  # none in shards
            if name := first_not_finite(weights):
                raise NotFiniteError(
                    f"the checkpoint holds NaN or infinity ({name}): resume from an older one of the run by ckpt_path=PATH"
                )
        self.step_losses = list(checkpoint.get("step_losses", []))
        self._initialised = True
        if self._trainer is not None and isinstance(data := self._data(), DataFlowDataModule):
            align_loops(checkpoint, data.accumulate_grad_batches(self.trainer.world_size))

    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _log_means(self, means: Mapping[str, Tensor]) -> None:
        metrics = {f"train/{name}": value for name, value in self.derived_metrics(means).items()}
        for name, value in means.items():
            if value.ndim:
                metrics |= {f"train/{name}_{index}": one for index, one in enumerate(value)}
            elif name != "loss":
                metrics[f"train/{name}"] = value
        self.log("train/loss", means["loss"], prog_bar=True, batch_size=1)
        self.log_dict(metrics, batch_size=1)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)

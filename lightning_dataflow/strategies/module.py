"""What every strategy's LightningModule shares: the target, the draft to start from, checkpoints."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_dataflow.callbacks.averaging import complete_average, follow_buffers
from lightning_dataflow.checkpoints.paths import forget_foreign_paths
from lightning_dataflow.contracts import NotFiniteError, UserError
from lightning_dataflow.data import DataFlowDataModule, FeatureCard
from lightning_dataflow.data.collate import Batch, SampleRows
from lightning_dataflow.data.finite import first_not_finite
from lightning_dataflow.evaluation import Drafter
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.strategies.published.reading import read_draft
from lightning_dataflow.strategies.registry import resolve_strategy
from lightning_dataflow.strategies.sharding import fsdp1_root, full_state_dict
from lightning_dataflow.strategies.spec import StrategySpec
from lightning_dataflow.strategies.streaming import align_loops
from lightning_dataflow.strategies.training import SumsModule
from lightning_dataflow.strategies.warm_start import check_settings, check_start, choose_layers, load_start
from lightning_dataflow.targets.base import check_layer_ids
from lightning_dataflow.targets.info import read_target_info

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGET_SIZES = (
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)
"""Sizes that a draft has from its target, unless it is told otherwise."""
Draft = TypeVar("Draft", bound=nn.Module)


class DraftModule(SumsModule):
    """Trains a draft of one frozen target.

    Subclasses set `strategy_name`, build `self.draft` in their constructor, and implement `collate`, `objective`,
    `drafter` and `num_draft_tokens`; `packs` says that they respect where samples begin in a row. A constructor names its
    own arguments and passes the others on as `**options`: LightningCLI finds them by reading the calls of
    `super().__init__`, and all are in `hparams`.

    Args:
        target: the target's Hugging Face folder. Only its sizes, embedding and head are read.
        layer_ids: target layers whose features the draft reads; None for the strategy's default.
        init_from: folder of a published draft of this target to start from, for SGLang or vLLM; its sizes are the draft's.
        network: sizes of the draft by their names in its configuration, in place of those of settings and target.
        target_dtype: of the frozen embedding and head, `float32` or `bfloat16`.
        lr, betas, weight_decay: of AdamW.
        warmup_ratio, min_lr_ratio: warm-up as a share of max_steps, final learning rate as a share of `lr`.
        seed: of the draft's initial weights, which do not depend on the global random state.
    """

    strategy_name: ClassVar[str]
    packs: ClassVar[bool] = False

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
        num_layers = self.target_info.num_layers
        self.layer_ids = check_layer_ids(layer_ids or self.spec.default_layer_ids(num_layers), num_layers)
        self._frozen: FrozenTarget | None = None
        self._initialised = False  # whether the draft has trained, published or initialised weights

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
    def frozen_target(self) -> FrozenTarget:
        """The target's embedding and head."""
        assert self._frozen is not None, "load_frozen_target comes first"
        return self._frozen

    @abstractmethod
    def collate(self, rows: SampleRows) -> Batch:
        """The batch that `objective` reads; called by the thread that reads ahead, so on the CPU."""

    @abstractmethod
    def drafter(self, *, num_draft_tokens: int) -> Drafter:
        """The draft as it stands, ready to decode. A collective under sharding: every rank calls it."""

    def full_draft_state(self) -> dict[str, Tensor]:
        """The unsharded state dict of the draft on every rank. A collective under sharding."""
        root = fsdp1_root(self.trainer.strategy.model) if self._trainer is not None else None
        return full_state_dict(root or self, "draft.")

    def unsharded(self, empty: Draft) -> Draft:
        """Fill a new draft with the weights as they stand, for decoding. A collective under sharding."""
        copy = empty.to(self.device)
        copy.load_state_dict(self.full_draft_state())
        return copy.eval()

    def check_data(self, data: DataFlowDataModule) -> None:
        """Raise UserError when this draft cannot be trained on the data; called before every fit."""

    def initialise_draft(self, data: DataFlowDataModule) -> None:
        """Set what depends on the target's tensors or on the data, once before a new draft trains."""

    def network_sizes(self, config: type[Any], **defaults: Any) -> dict[str, Any]:
        """Fields of `config`, a dataclass: those of the draft to start from, else the constructor's arguments that are not
        None, else defaults, else the target's. Raises UserError when arguments and the draft to start from differ."""
        names = [field.name for field in fields(config)]
        settings = {name: value for name in names if (value := self.hparams.get(name)) is not None}
        if self._start is not None:
            check_settings(self._start, settings)
        sizes = {name: getattr(self.target_info, name) for name in TARGET_SIZES if name in names}
        sizes |= {"num_aux_layers": len(self.layer_ids)}
        return {**sizes, **defaults, **settings, **(self.hparams["network"] or {})}

    def new_draft(self, draft: Callable[[Any], Draft], config: Any) -> Draft:
        """A draft of `config`, whose weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.hparams["seed"])
            return draft(config)

    def load_start(self) -> None:
        """Take over the weights of the draft to start from; done by the first fit."""
        export = self.spec.export
        assert self._start is not None and export is not None, "nothing to start from"
        load_start(self._start, export, self.draft, self.frozen_target)
        self._initialised = True

    def load_frozen_target(self, device: torch.device) -> None:
        """Read the target's embedding and head, unless that is done."""
        if self._frozen is None:
            self._frozen = FrozenTarget.of(self.target_info, DTYPES[self.hparams["target_dtype"]])
        self._frozen.to(device)

    def setup(self, stage: str) -> None:
        """Refuse data that does not fit, then initialise the draft."""
        self.load_frozen_target(self.trainer.strategy.root_device)
        if stage == "fit" and isinstance(data := self._data(), DataFlowDataModule):
            self.check_packing(data)
            self.check_features(data.source.card)
            self.check_data(data)
            if not self._initialised and self._start is not None:
                self.load_start()
            elif not self._initialised:
                self.initialise_draft(data)
                self._initialised = True
            follow_buffers(self.trainer)

    def check_features(self, card: FeatureCard) -> None:
        """Raise UserError naming the first way in which captured features do not fit this draft."""
        strategy, target, weights = self.strategy_name, self.target_info, card.target_model_version
        if missing := set(self.features) - set(card.features):
            raise UserError(f"the features lack {', '.join(sorted(missing))}, which {strategy} needs: capture again")
        for what, actual, wanted in (
            ("hidden size", card.capture.hidden_size, target.hidden_size),
            ("norm of the last hidden state", card.capture.norm, "post"),
            ("tokenizer", card.tokenizer_version, target.tokenizer_version),
            ("target weights", weights, weights if target.has_version(weights) else target.model_version),
        ):
            if actual != wanted:
                raise UserError(
                    f"the features were captured with another {what} ({actual}, this draft's target {target.path} has "
                    f"{wanted}): capture again with this target, or train with the one they came from"
                )
        if card.capture.layer_ids != self.layer_ids:
            layers = list(card.capture.layer_ids)
            raise UserError(
                f"the features hold the target's layers {layers}, this {strategy} draft reads {list(self.layer_ids)}: "
                f"capture again with strategy={strategy}, or set 'strategy.layer_ids={layers}'"
            )

    def check_packing(self, data: DataFlowDataModule) -> None:
        """Raise UserError when samples are packed for a draft that cannot tell them apart, or do not fit into a row."""
        row_tokens, longest = data.batching.row_tokens, data.source.card.max_num_tokens
        if data.batching.packed and not self.packs:
            raise UserError(f"{self.strategy_name} does not pack samples: leave row_tokens and rows_per_step out")
        if row_tokens is not None and row_tokens < longest:
            raise UserError(
                f"row_tokens={row_tokens} is less than the {longest} tokens of the longest sample: raise it, or cut "
                "samples to a smaller max_length"
            )

    def configure_model(self) -> None:
        """Shard under ModelParallelStrategy (FSDP2), the draft as one unit, since its unrolled steps reuse one layer. Other
        strategies wrap the module themselves."""
        if self.device_mesh is not None and not isinstance(self.draft, FSDPModule):
            fully_shard(self.draft, mesh=self.device_mesh["data_parallel"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the losses so far with the weights. Raises NotFiniteError; see `check_weights`."""
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
        """What a checkpoint must have in common with a draft that resumes from it, by the names that an error shows."""
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
        saved = dict(checkpoint.get("identity", {}))
        if self.target_info.has_version(saved.get("target weights", "")):
            saved["target weights"] = self.target_info.model_version
        for name, value in self.identity().items():
            if saved.get(name) != value:
                raise UserError(
                    f"the checkpoint is of a draft with {name}={saved.get(name)}, this one has {value}: resume with the "
                    "settings that it was written with, or start a new run"
                )
        if isinstance(data, DataFlowDataModule):
            data.check_state(checkpoint.get(type(data).__qualname__, {}))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self._data() if self._trainer is not None else None
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self.check_checkpoint(checkpoint, data)
            forget_foreign_paths(self.trainer.checkpoint_callbacks, checkpoint.get("callbacks", {}))
            weights = {**checkpoint.get("state_dict", {}), **checkpoint.get("current_model_state", {})}  # none in shards
            if name := first_not_finite(weights):
                raise NotFiniteError(
                    f"the checkpoint holds NaN or infinity ({name}): resume from an older one of the run by ckpt_path=PATH"
                )
        self.step_losses = list(checkpoint.get("step_losses", []))
        self._initialised = True
        if isinstance(data, DataFlowDataModule):
            align_loops(checkpoint, data.accumulate_grad_batches(self.trainer.world_size))

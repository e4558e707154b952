"""EAGLE3 (arXiv 2503.01840) as a LightningModule."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dataflow.contracts import StepContext, UserError
from lightning_dataflow.data.collate import Batch, SampleRows
from lightning_dataflow.data.datamodule import DataFlowDataModule
from lightning_dataflow.strategies.common.sums import ObjectiveSums
from lightning_dataflow.strategies.eagle3.coverage import CoverageCheck
from lightning_dataflow.strategies.eagle3.draft_vocab import most_frequent, version
from lightning_dataflow.strategies.eagle3.drafter import ChainDrafter
from lightning_dataflow.strategies.eagle3.export import Eagle3Export
from lightning_dataflow.strategies.eagle3.network import Eagle3Config, Eagle3Draft
from lightning_dataflow.strategies.eagle3.objective import Eagle3Objective, supervised_positions
from lightning_dataflow.strategies.module import DraftModule
from lightning_dataflow.strategies.spec import StrategySpec


class Eagle3Module(DraftModule):
    """Trains an EAGLE3 draft with K unrolled steps.

    A reduced draft vocabulary is cut from the supervised tokens of the training data when a new draft starts; embeddings
    and head start from the target's.

    Args:
        draft_vocab_size: V_d; None for the target's whole vocabulary.
        num_steps: K, how often the draft is unrolled on its own outputs.
        intermediate_size: of the draft's MLP; None for the target's.
        train_embeddings: train the token embedding too; by default the target's stays frozen.
        step_weight_base, lk_loss, kl_scale, kl_decay: see Eagle3Objective.

    The other arguments are DraftModule's.
    """

    strategy_name = "eagle3"
    packs = True
    draft: Eagle3Draft

    def __init__(
        self,
        target: str,
        layer_ids: list[int] | None = None,
        draft_vocab_size: int | None = None,
        num_steps: int = 7,
        intermediate_size: int | None = None,
        train_embeddings: bool = False,
        step_weight_base: float = 0.8,
        lk_loss: str | None = None,
        kl_scale: float = 0.9,
        kl_decay: float = 1.5,
        **options: Any,
    ):
        super().__init__(target, layer_ids, **options)
        if lk_loss not in (None, "alpha", "lambda"):
            raise UserError(f"lk_loss={lk_loss} is unknown: use alpha, lambda, or leave it out")
        if num_steps < 1:
            raise UserError(f"num_steps={num_steps}: the draft needs at least one step")
        sizes = self.network_sizes(Eagle3Config, draft_vocab_size=self.target_info.vocab_size)
        self.draft = self.new_draft(Eagle3Draft, Eagle3Config(**sizes))
        self._vocab_prompts = ""  # version of the prompts that the draft vocabulary was cut from
        self._objective = Eagle3Objective(
            step_weight_base=step_weight_base,
            lk_loss=lk_loss,  # type: ignore[arg-type]  # checked above
            kl_scale=kl_scale,
            kl_decay=kl_decay,
        )

    @property
    def num_draft_tokens(self) -> int:
        return int(self.hparams["num_steps"])

    @torch.no_grad()
    def initialise_draft(self, data: DataFlowDataModule) -> None:
        target, config = self.frozen_target, self.draft.config
        if config.draft_vocab_size < config.vocab_size:
            self.draft.set_target_ids(self._cut_vocab(data))
            self._vocab_prompts = data.source.card.prompts_version
        self.draft.lm_head.weight.copy_(target.head[self.draft.target_ids.to(target.head.device)])
        if target.transform is not None:
            self.draft.lm_head.weight.mul_(target.transform.scale)
        if config.train_embeddings:
            self.draft.embed_tokens.weight.copy_(target.embedding)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["draft_vocab"] = {"prompts": self._vocab_prompts, "version": version(self.draft.target_ids)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._vocab_prompts = checkpoint["draft_vocab"]["prompts"]

    def check_checkpoint(self, checkpoint: Mapping[str, Any], data: Any) -> None:
        """The map of the draft's vocabulary must be the one that these prompts give."""
        super().check_checkpoint(checkpoint, data)
        saved = checkpoint["draft_vocab"]
        if isinstance(data, DataFlowDataModule) and saved["prompts"] == data.source.card.prompts_version:
            wanted = version(self._cut_vocab(data))
            if wanted != saved["version"]:
                raise UserError(
                    f"the checkpoint is of a draft with another vocabulary map ({saved['version']}, these prompts give "
                    f"{wanted}): resume with the prompts it was written with, or start a new run"
                )

    def _cut_vocab(self, data: DataFlowDataModule) -> Tensor:
        config = self.draft.config
        return most_frequent(data.source.token_counts(config.vocab_size), config.draft_vocab_size)

    def collate(self, rows: SampleRows) -> Batch:
        """Features, and which rows supervise which; computed on the CPU, so that a step need not wait for the device."""
        batch = rows.stack(self.features)
        batch["target_rows"] = supervised_positions(batch["loss_mask"], batch["position"])
        return batch

    def objective(self, batch: Batch, context: StepContext) -> ObjectiveSums:
        draft, target = self.draft, self.frozen_target
        score = partial(
            self._objective,
            last_hidden_state=batch["last_hidden_state"],
            target_head=target.head,
            target_ids=draft.target_ids,
            t2d=draft.t2d,
            rows=batch["target_rows"],
            transform=target.transform,
        )
        next_ids = F.pad(batch["input_ids"][:, 1:], (0, 1))
        embedding = None if draft.config.train_embeddings else target.embedding
        aux, num_steps = batch["aux_hidden_states"].to(draft.fc.weight.dtype), self.hparams["num_steps"]
        return draft(next_ids, aux, embedding, num_steps, score, position=batch["position"])

    def drafter(self, *, num_draft_tokens: int = 4) -> ChainDrafter:
        draft = self.unsharded(Eagle3Draft(self.draft.config))
        embedding = None if draft.config.train_embeddings else self.frozen_target.embedding
        return ChainDrafter(draft, embedding, num_draft_tokens=num_draft_tokens)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._coverage = CoverageCheck()

    def judge_means(self, means: Mapping[str, Tensor]) -> None:
        if self.draft.config.draft_vocab_size < self.draft.config.vocab_size:
            self._coverage.add(means["outside_vocab"].where(means["loss"].isfinite(), torch.nan))

    def on_train_epoch_end(self) -> None:
        self._coverage.finish()
        super().on_train_epoch_end()

    def derived_metrics(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Simulated acceptance length 1 + a_0 + a_0·a_1 + …, greedy from accuracies, sampled from acceptance rates."""
        return {
            "acceptance_length_greedy": 1 + means["accuracy"].cumprod(0).sum(),
            "acceptance_length_sampled": 1 + means["acceptance_rate"].cumprod(0).sum(),
        }


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Low, middle and high: [1, L // 2 − 1, L − 4]; of a shallow target the first, middle and last but one."""
    if num_layers < 7:
        return tuple(sorted({0, max(0, num_layers - 2) // 2, max(0, num_layers - 2)}))
    return 1, num_layers // 2 - 1, num_layers - 4


SPEC = StrategySpec(
    name="eagle3",
    title="EAGLE3",
    paper="2503.01840",
    module=Eagle3Module,
    default_layer_ids=default_layer_ids,
    features=lambda settings: ("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_state"),
    export=Eagle3Export(),
)

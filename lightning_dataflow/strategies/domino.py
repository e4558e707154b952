"""Domino (arXiv 2605.29707) as a LightningModule."""

import torch
from torch import Tensor

from lightning_dataflow.contracts import StepContext
from lightning_dataflow.data.collate import Batch
from lightning_dataflow.evaluation import DominoDrafter
from lightning_dataflow.models import DominoConfig, DominoDraft
from lightning_dataflow.objectives import DominoObjective, ObjectiveSums
from lightning_dataflow.strategies.block_module import BLOCK_FEATURES, BlockDraftModule, default_layer_ids
from lightning_dataflow.strategies.registry import StrategySpec, register_strategy


class DominoModule(BlockDraftModule):
    """Trains a Domino draft: DFlash, and a correction of its logits by the tokens before each offset.

    Args:
        num_layers, block_size, intermediate_size, layer_types, sliding_window, gamma: see DFlashModule.
        gru_hidden_dim, emb_dim, shift_label, pure_draft_prefix_len: see DominoConfig.
        lambda_start, lambda_decay_ratio: see DominoObjective.

    The other arguments are BlockDraftModule's.
    """

    strategy_name = "domino"
    draft: DominoDraft

    def __init__(
        self,
        target: str,
        layer_ids: list[int] | None = None,
        num_layers: int = 5,
        block_size: int = 16,
        num_anchors: int = 256,
        mask_token_id: int | None = None,
        intermediate_size: int | None = None,
        layer_types: list[str] | None = None,
        sliding_window: int | None = None,
        gamma: float = 7.0,
        gru_hidden_dim: int = 512,
        emb_dim: int = 256,
        shift_label: bool = False,
        pure_draft_prefix_len: int = 0,
        lambda_start: float = 1.0,
        lambda_decay_ratio: float = 0.5,
        target_dtype: str = "float32",
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.02,
        min_lr_ratio: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(
            target,
            layer_ids,
            num_anchors,
            mask_token_id,
            target_dtype,
            lr,
            betas,
            weight_decay,
            warmup_ratio,
            min_lr_ratio,
            seed,
        )
        self.save_hyperparameters()
        self.shift_label = shift_label
        sizes = self.draft_sizes(
            num_layers=num_layers,
            block_size=block_size,
            intermediate_size=intermediate_size,
            layer_types=layer_types,
            sliding_window=sliding_window,
        )
        config = DominoConfig(
            gru_hidden_dim=gru_hidden_dim,
            emb_dim=emb_dim,
            shift_label=shift_label,
            pure_draft_prefix_len=pure_draft_prefix_len,
            **sizes,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.draft = DominoDraft(config)
        self._objective = DominoObjective(
            gamma=gamma, shift_label=shift_label, lambda_start=lambda_start, lambda_decay_ratio=lambda_decay_ratio
        )

    def objective(self, batch: Batch, context: StepContext) -> ObjectiveSums:
        """See DraftModule."""
        target, blocks = self.frozen_target, self.blocks(batch)

        def score(hidden: Tensor, features: Tensor, weight: Tensor) -> ObjectiveSums:
            return self._objective(hidden, features, weight, target.head, blocks, context, batch["label_rows"])

        return self.draft(batch["aux_hidden_states"], target.embedding, blocks, score, position=batch["position"])

    def drafter(self, *, num_draft_tokens: int = 15) -> DominoDrafter:
        """See DraftModule."""
        draft = self.unsharded(DominoDraft(self.draft.config))
        return DominoDrafter(draft, self.frozen_target, num_draft_tokens=num_draft_tokens)


register_strategy(
    StrategySpec(
        name="domino",
        module=DominoModule,
        default_layer_ids=default_layer_ids,
        features=BLOCK_FEATURES,
    )
)

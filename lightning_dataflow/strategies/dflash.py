"""DFlash (arXiv 2602.06036) as a LightningModule, with D-PACE (arXiv 2605.18810) as an option."""

import torch
from torch import Tensor

from lightning_dataflow.contracts import StepContext, UserError
from lightning_dataflow.data.collate import Batch
from lightning_dataflow.evaluation import BlockDrafter
from lightning_dataflow.models import DFlashConfig, DFlashDraft
from lightning_dataflow.objectives import DFlashObjective, ObjectiveSums
from lightning_dataflow.strategies.block_module import BLOCK_FEATURES, BlockDraftModule, default_layer_ids
from lightning_dataflow.strategies.registry import StrategySpec, register_strategy


class DFlashModule(BlockDraftModule):
    """Trains a DFlash draft: blocks of mask tokens at random anchors, through the target's frozen head.

    Args:
        num_layers: of the draft.
        block_size: B, positions of a block; it drafts B − 1 tokens.
        intermediate_size: of the draft's MLPs; None for the target's.
        layer_types, sliding_window: see DFlashConfig; None for full attention.
        gamma, dpace_alpha: see DFlashObjective.
        loss: `decay` or `dpace`.

    The other arguments are BlockDraftModule's.
    """

    strategy_name = "dflash"

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
        loss: str = "decay",
        dpace_alpha: float = 0.5,
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
        if loss not in ("decay", "dpace"):
            raise UserError(f"loss={loss} is unknown: use decay or dpace")
        sizes = self.draft_sizes(
            num_layers=num_layers,
            block_size=block_size,
            intermediate_size=intermediate_size,
            layer_types=layer_types,
            sliding_window=sliding_window,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.draft = DFlashDraft(DFlashConfig(**sizes))
        self._objective = DFlashObjective(gamma=gamma, dpace=loss == "dpace", dpace_alpha=dpace_alpha)

    def objective(self, batch: Batch, context: StepContext) -> ObjectiveSums:
        """See DraftModule."""
        target, blocks = self.frozen_target, self.blocks(batch)

        def score(hidden: Tensor) -> ObjectiveSums:
            return self._objective(hidden, target.head, blocks, batch["label_rows"])

        return self.draft(batch["aux_hidden_states"], target.embedding, blocks, score, position=batch["position"])

    def drafter(self, *, num_draft_tokens: int = 15) -> BlockDrafter:
        """See DraftModule."""
        draft = self.unsharded(DFlashDraft(self.draft.config))
        return BlockDrafter(draft, self.frozen_target, num_draft_tokens=num_draft_tokens)


register_strategy(
    StrategySpec(
        name="dflash",
        module=DFlashModule,
        default_layer_ids=default_layer_ids,
        features=BLOCK_FEATURES,
    )
)

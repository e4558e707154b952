"""DFlash (arXiv 2602.06036) as a LightningModule, with D-PACE (arXiv 2605.18810) as an option."""

from typing import Any

from torch import Tensor

from lightning_dataflow.contracts import StepContext, UserError
from lightning_dataflow.data.collate import Batch
from lightning_dataflow.strategies.blocks.drafter import BlockDrafter
from lightning_dataflow.strategies.blocks.module import BLOCK_FEATURES, BlockDraftModule, default_layer_ids
from lightning_dataflow.strategies.blocks.network import BlockConfig
from lightning_dataflow.strategies.common.sums import ObjectiveSums
from lightning_dataflow.strategies.dflash.export import DFlashExport
from lightning_dataflow.strategies.dflash.network import DFlashDraft
from lightning_dataflow.strategies.dflash.objective import DFlashObjective
from lightning_dataflow.strategies.spec import StrategySpec


class DFlashModule(BlockDraftModule):
    """Trains a DFlash draft: blocks of mask tokens at random anchors, through the target's frozen head.

    Args:
        gamma, dpace_alpha: see DFlashObjective.
        loss: `decay` or `dpace`.

    The other arguments are BlockDraftModule's.
    """

    strategy_name = "dflash"

    def __init__(self, target: str, gamma: float = 7.0, loss: str = "decay", dpace_alpha: float = 0.5, **options: Any):
        super().__init__(target, **options)
        if loss not in ("decay", "dpace"):
            raise UserError(f"loss={loss} is unknown: use decay or dpace")
        self.draft = self.block_draft(DFlashDraft, BlockConfig)
        self._objective = DFlashObjective(gamma=gamma, dpace=loss == "dpace", dpace_alpha=dpace_alpha)

    def objective(self, batch: Batch, context: StepContext) -> ObjectiveSums:
        target, blocks = self.frozen_target, self.blocks(batch)

        def score(hidden: Tensor) -> ObjectiveSums:
            return self._objective(hidden, target.head, blocks, batch["label_rows"])

        return self.draft(batch["aux_hidden_states"], target.embedding, blocks, score, position=batch["position"])

    def drafter(self, *, num_draft_tokens: int = 15) -> BlockDrafter:
        draft = self.unsharded(DFlashDraft(self.draft.config))
        return BlockDrafter(draft, self.frozen_target, num_draft_tokens=num_draft_tokens)


SPEC = StrategySpec(
    name="dflash",
    title="DFlash",
    paper="2602.06036",
    module=DFlashModule,
    default_layer_ids=default_layer_ids,
    features=lambda settings: BLOCK_FEATURES,
    export=DFlashExport(),
)

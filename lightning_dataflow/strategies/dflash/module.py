"""DFlash (arXiv 2602.06036) as a LightningModule, with D-PACE (arXiv 2605.18810) as an option."""

from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.blocks.module import BLOCK_FEATURES, BlockDraftModule, default_layer_ids
from lightning_dataflow.strategies.dflash.export import DFlashExport
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
        self.block_objective = DFlashObjective(gamma=gamma, dpace=loss == "dpace", dpace_alpha=dpace_alpha)


SPEC = StrategySpec(
    name="dflash",
    title="DFlash",
    paper="2602.06036",
    module=DFlashModule,
    default_layer_ids=default_layer_ids,
    features=lambda settings: BLOCK_FEATURES,
    export=DFlashExport(),
)

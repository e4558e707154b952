"""Domino (arXiv 2605.29707) as a LightningModule."""

from typing import Any

from lightning_dataflow.strategies.blocks.module import BLOCK_FEATURES, BlockDraftModule, default_layer_ids
from lightning_dataflow.strategies.domino.drafter import DominoDrafter
from lightning_dataflow.strategies.domino.export import DominoExport
from lightning_dataflow.strategies.domino.network import DominoConfig, DominoDraft
from lightning_dataflow.strategies.domino.objective import DominoObjective
from lightning_dataflow.strategies.spec import StrategySpec


class DominoModule(BlockDraftModule):
    """Trains a Domino draft: DFlash, and a correction of its logits by the tokens before each offset.

    Args:
        gru_hidden_dim, emb_dim, shift_label, pure_draft_prefix_len: see DominoConfig; None for its defaults.
        gamma, lambda_start, lambda_decay_ratio: see DominoObjective.

    The other arguments are BlockDraftModule's.
    """

    strategy_name = "domino"
    draft_type, config_type, drafter_type = DominoDraft, DominoConfig, DominoDrafter

    def __init__(
        self,
        target: str,
        gamma: float = 7.0,
        gru_hidden_dim: int | None = None,
        emb_dim: int | None = None,
        shift_label: bool | None = None,
        pure_draft_prefix_len: int | None = None,
        lambda_start: float = 1.0,
        lambda_decay_ratio: float = 0.5,
        **options: Any,
    ):
        super().__init__(target, **options)
        self.block_objective = DominoObjective(
            gamma=gamma,
            first_offset=self.draft.config.first_offset,
            lambda_start=lambda_start,
            lambda_decay_ratio=lambda_decay_ratio,
        )


SPEC = StrategySpec(
    name="domino",
    title="Domino",
    paper="2605.29707",
    module=DominoModule,
    default_layer_ids=default_layer_ids,
    features=lambda settings: BLOCK_FEATURES,
    export=DominoExport(),
)

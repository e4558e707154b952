"""What the modules that draft whole blocks share: anchors, the mask token, the batch, the drafter."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from lightning_dataflow.contracts import StepContext, UserError
from lightning_dataflow.data.collate import Batch, SampleRows
from lightning_dataflow.data.datamodule import DataFlowDataModule
from lightning_dataflow.strategies.blocks.anchors import draw_anchors
from lightning_dataflow.strategies.blocks.blocks import Span, cut_blocks
from lightning_dataflow.strategies.blocks.drafter import BlockDrafter
from lightning_dataflow.strategies.blocks.labels import BlockLabels
from lightning_dataflow.strategies.blocks.mask_token import choose_mask_token
from lightning_dataflow.strategies.blocks.network import FULL, BlockConfig, BlockDraft
from lightning_dataflow.strategies.common.sums import ObjectiveSums
from lightning_dataflow.strategies.module import DraftModule
from lightning_dataflow.targets.info import load_tokenizer

MAX_ANCHORS = 512
BLOCK_FEATURES = ("input_ids", "loss_mask", "aux_hidden_states")


class BlockDraftModule(DraftModule):
    """Trains a draft on blocks of tokens at random anchors.

    Subclasses name the classes of their network, its configuration and its drafter, and set `block_objective`. It is called
    with what the network hands to `score`, and with the target's `head`, `blocks`, `context` and the labels' `rows`; also
    with `transform` if the target has one.

    Args:
        num_layers: of the draft; None for 5.
        block_size: B, positions of a block; None for 16.
        num_anchors: blocks drawn from a sample and pass, at most.
        mask_token_id: None for a token that the tokenizer does not use.
        intermediate_size: of the draft's MLPs; None for the target's.
        layer_types, sliding_window: see BlockConfig; None for full attention.

    The other arguments are DraftModule's.
    """

    packs = True
    draft_type: ClassVar[type[BlockDraft]] = BlockDraft
    config_type: ClassVar[type[BlockConfig]] = BlockConfig
    drafter_type: ClassVar[type[BlockDrafter]] = BlockDrafter
    draft: BlockDraft
    block_objective: Callable[..., ObjectiveSums]

    def __init__(
        self,
        target: str,
        layer_ids: list[int] | None = None,
        num_layers: int | None = None,
        block_size: int | None = None,
        num_anchors: int = 256,
        mask_token_id: int | None = None,
        intermediate_size: int | None = None,
        layer_types: list[str] | None = None,
        sliding_window: int | None = None,
        **options: Any,
    ):
        super().__init__(target, layer_ids, **options)
        if not 1 <= num_anchors <= MAX_ANCHORS:
            raise UserError(f"num_anchors={num_anchors}: choose 1 to {MAX_ANCHORS} blocks a sample")
        start = {} if self._start is None else self._start.network
        if not start.get("layer_types") and list(layer_types or ()) == [FULL] * start.get("num_layers", 0):
            self.hparams["layer_types"] = None  # the same as in the draft to start from, spelt out
        sizes = self.network_sizes(self.config_type, num_layers=5)
        if "mask_token_id" not in sizes:
            sizes["mask_token_id"] = choose_mask_token(load_tokenizer(target), self.target_info.vocab_size)
        sizes["layer_types"] = tuple(sizes.get("layer_types") or ())
        self.draft = self.new_draft(self.draft_type, self.config_type(**sizes))
        self._has_blocks = False  # known once a whole pass was read

    @property
    def num_draft_tokens(self) -> int:
        return self.draft.config.block_size - 1

    @property
    def mask_token_id(self) -> int:
        """Stands for the tokens to be drafted."""
        return self.draft.config.mask_token_id

    def check_data(self, data: DataFlowDataModule) -> None:
        """A block must fit into a sample. The mask token must not occur in the data, and must have an embedding."""
        block_size, longest = self.draft.config.block_size, data.source.card.max_num_tokens
        if block_size > longest:
            raise UserError(
                f"block_size={block_size} is more than the {longest} tokens of the longest sample: set strategy.block_size "
                f"to at most {longest}, or give longer samples (data.max_length)"
            )
        counts = data.source.token_counts(self.target_info.vocab_size)
        remedy = "set strategy.mask_token_id to a token that the data does not have"
        if counts[self.mask_token_id] > 0:
            raise UserError(
                f"mask_token_id={self.mask_token_id} occurs {int(counts[self.mask_token_id])} times among the supervised "
                f"tokens of the training data: {remedy}"
            )
        if not self.frozen_target.embedding[self.mask_token_id].any():
            raise UserError(f"mask_token_id={self.mask_token_id} has an embedding of zeros in this target: {remedy}")

    def collate(self, rows: SampleRows) -> Batch:
        """Features, the blocks, and which of their offsets are supervised (computed here on the CPU, so that a step
        need not wait for the device)."""
        batch = rows.stack(self.features)
        num_anchors, seed, placed = self.hparams["num_anchors"], self.hparams["seed"], list(rows)
        anchors = [draw_anchors(sample, num_anchors, seed) for sample, *_ in placed]
        spans = [Span(row, start, stop) for _, row, start, stop in placed]
        blocks = cut_blocks(batch["input_ids"], batch["loss_mask"], anchors, self.draft.config.block_size, spans)
        batch["blocks"], batch["label_rows"] = blocks, BlockLabels.of(blocks, first=self.draft.config.first_offset).rows
        return batch

    def objective(self, batch: Batch, context: StepContext) -> ObjectiveSums:
        target, blocks = self.frozen_target, batch["blocks"]
        given = {"head": target.head, "blocks": blocks, "context": context, "rows": batch["label_rows"]}
        if target.transform is not None:
            given["transform"] = target.transform
        score = partial(self.block_objective, **given)
        return self.draft(batch["aux_hidden_states"], target.embedding, blocks, score, position=batch["position"])

    def drafter(self, *, num_draft_tokens: int = 15) -> BlockDrafter:
        draft = self.unsharded(self.draft_type(self.draft.config))
        return self.drafter_type(draft, self.frozen_target, num_draft_tokens=num_draft_tokens)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Refuse data without any block, once a whole pass over it, or the whole run, had none."""
        data = self._data()
        num_steps = len(self.step_losses)
        if self._has_blocks or (data.next_seq < len(data.source) and num_steps < self.trainer.max_steps):
            return
        self._has_blocks = any(float(loss) != 0 for loss in self.step_losses)
        if not self._has_blocks:
            raise UserError(
                f"no sample of {num_steps} steps has two supervised tokens in a row, so there is no block to train "
                f"{self.strategy_name} on: look at the masks with `lightning-dataflow show-mask`, or train a strategy "
                "that drafts token by token"
            )


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Five layers spread evenly from 1 to L − 3; fewer where the target is too small for as many."""
    num_ids = max(1, min(5, num_layers - 3))
    if num_ids == 1:
        return (num_layers // 2,)
    return tuple(round(1 + k * (num_layers - 4) / (num_ids - 1)) for k in range(num_ids))

"""SGLang's folders (read in 0.5.23). It ignores tensors whose names it does not know, and says nothing."""

from shlex import quote

from lightning_dataflow.contracts import UserError
from lightning_dataflow.export.base import Config, DraftFormat, DraftSpec, block_fields, eagle3_fields
from lightning_dataflow.strategies.domino.network import DominoConfig
from lightning_dataflow.strategies.eagle3.network import Eagle3Config

SERVED_PREFIX_LEN = 1
"""Domino drafts are served with the first drafted token uncorrected, and no other way."""


class SGLangFormat(DraftFormat):
    """Layer ids are ours."""

    name = "sglang"
    title = "SGLang"
    strategies = ("eagle3", "dflash", "domino")

    def check(self, draft: DraftSpec) -> None:
        """See DraftFormat."""
        super().check(draft)
        network = draft.network
        if isinstance(network, Eagle3Config) and network.train_embeddings:
            raise UserError(
                "SGLang gives every EAGLE3 draft the target's token embedding, so it does not serve one that was trained "
                "(strategy.train_embeddings=true): export for vllm"
            )
        if isinstance(network, Eagle3Config) and len(draft.layer_ids) < 2:
            raise UserError(
                f"SGLang does not serve an EAGLE3 draft of one target layer ({draft.layer_ids[0]}), it leaves out fc: "
                "export for vllm, or train with two or more strategy.layer_ids"
            )
        if draft.layer_ids[-1] == draft.num_target_layers - 1:
            raise UserError(
                f"SGLang does not capture the target's last layer ({draft.layer_ids[-1]}), which this draft reads: export "
                "for vllm, or train with other strategy.layer_ids"
            )
        if isinstance(network, DominoConfig) and network.pure_draft_prefix_len != SERVED_PREFIX_LEN:
            raise UserError(
                f"SGLang serves Domino drafts with pure_draft_prefix_len={SERVED_PREFIX_LEN} only, this one has "
                f"{network.pure_draft_prefix_len}: train with strategy.pure_draft_prefix_len={SERVED_PREFIX_LEN}"
            )

    def config(self, draft: DraftSpec, dtype: str) -> Config:
        """See DraftFormat."""
        fields = eagle3_fields(draft, list(draft.layer_ids)) if draft.strategy == "eagle3" else block_fields(draft)
        return fields | {"dtype": dtype}

    def serve_command(self, draft: DraftSpec, folder: str) -> str:
        """See DraftFormat."""
        drafted, eagle3 = draft.num_draft_tokens, draft.strategy == "eagle3"
        options = [
            f"python -m sglang.launch_server --model-path {quote(draft.target)} --dtype bfloat16",
            f"--speculative-algorithm {'EAGLE3' if eagle3 else 'DFLASH'} --speculative-draft-model-path {quote(folder)}",
            f"--speculative-num-draft-tokens {drafted + 1}",
        ]
        if eagle3:
            options[-1] = f"--speculative-num-steps {drafted} --speculative-eagle-topk 1 {options[-1]}"
        return " \\\n  ".join(options)

"""Drafts of a target with 8 layers, whose every weight is random."""

import torch

from lightning_dataflow.strategies.blocks.network import BlockConfig, BlockDraft
from lightning_dataflow.strategies.domino.network import DominoConfig, DominoDraft
from lightning_dataflow.strategies.eagle3.draft_vocab import most_frequent
from lightning_dataflow.strategies.eagle3.network import Eagle3Config, Eagle3Draft
from lightning_dataflow.strategies.published.contract import DraftDescription

LAYERS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
}
BLOCK = {**LAYERS, "num_layers": 2, "mask_token_id": 39, "num_aux_layers": 3, "block_size": 6}
NETWORKS = {
    "eagle3": Eagle3Config(**LAYERS, draft_vocab_size=12),
    "eagle3-whole": Eagle3Config(**LAYERS, draft_vocab_size=40),
    "eagle3-own-embedding": Eagle3Config(**LAYERS, draft_vocab_size=12, train_embeddings=True),
    "dflash": BlockConfig(**BLOCK),
    "dflash-sliding": BlockConfig(**BLOCK, layer_types=("sliding_attention",) * 2, sliding_window=4),
    "dflash-mixed": BlockConfig(**BLOCK, layer_types=("full_attention", "sliding_attention"), sliding_window=4),
    "domino": DominoConfig(**BLOCK, gru_hidden_dim=10, emb_dim=6, pure_draft_prefix_len=1),
    "domino-shifted": DominoConfig(**BLOCK, gru_hidden_dim=10, emb_dim=6, pure_draft_prefix_len=1, shift_label=True),
    "domino-corrected": DominoConfig(**BLOCK, gru_hidden_dim=10, emb_dim=6, pure_draft_prefix_len=0),
}
CLASSES = {Eagle3Config: Eagle3Draft, BlockConfig: BlockDraft, DominoConfig: DominoDraft}


def describe(kind: str, **fields) -> DraftDescription:
    """What there is to say of one of the NETWORKS."""
    given = {
        "strategy": kind.partition("-")[0],
        "network": NETWORKS[kind],
        "layer_ids": (1, 3, 4),
        "num_target_layers": 8,
        "max_position_embeddings": 512,
        "num_draft_tokens": 5,
        "target": "models/tiny",
        "target_architectures": ("LlamaForCausalLM",),
    }
    return DraftDescription(**given | fields)


def make_draft(kind: str) -> torch.nn.Module:
    """A draft of one of the NETWORKS."""
    torch.manual_seed(0)
    network = NETWORKS[kind]
    draft = CLASSES[type(network)](network)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter)
    if isinstance(network, Eagle3Config):
        draft.set_target_ids(most_frequent(torch.randint(0, 9, (40,)), network.draft_vocab_size))
    return draft

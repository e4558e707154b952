"""Which checkpoints are exported, how they are kept, and what engine serves each."""

from pathlib import Path

import lightning as L

from lightning_dataflow import DFlashModule, DominoModule, Eagle3Module, export_draft

SMALL = {"num_layers": 1, "block_size": 6, "num_anchors": 12}
SLIDING = {"layer_types": ["sliding_attention"], "sliding_window": 5}
PREFIX = {"gru_hidden_dim": 8, "emb_dim": 8, "pure_draft_prefix_len": 1}
KINDS = {
    "eagle3": (Eagle3Module, {"draft_vocab_size": 64, "num_steps": 2}),
    "whole": (Eagle3Module, {"num_steps": 2, "intermediate_size": 96}),
    "embedding": (Eagle3Module, {"draft_vocab_size": 64, "num_steps": 2, "train_embeddings": True}),
    "dflash": (DFlashModule, SMALL),
    "sliding": (DFlashModule, SMALL | SLIDING),
    "domino": (DominoModule, SMALL | PREFIX),
    "shifted": (DominoModule, SMALL | PREFIX | {"shift_label": True}),
}
ENGINES = {"embedding": ("vllm", "plain"), "whole": ("vllm", "speculators"), "sliding": ("vllm", "speculators")}


def saver(folder):
    return L.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def export(source, folder, kind="eagle3", **options) -> Path:
    engine, form = ENGINES.get(kind, ("sglang", "plain"))
    return export_draft(source, folder, **{"engine": engine, "format": form, "dtype": "float32"} | options)

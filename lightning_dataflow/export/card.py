"""The model card: what the draft is, how to serve it, how it was trained, and what it was measured to accept."""

import json
from pathlib import PurePath

from lightning_dataflow.export.base import DraftFormat, DraftSpec
from lightning_dataflow.export.training import DECODING, TrainingRecord
from lightning_dataflow.strategies.blocks.network import BlockConfig
from lightning_dataflow.strategies.domino.network import DominoConfig
from lightning_dataflow.strategies.eagle3.network import Eagle3Config

PAPERS = {"eagle3": "2503.01840", "dflash": "2602.06036", "domino": "2605.29707"}
NAMES = {"eagle3": "EAGLE3", "dflash": "DFlash", "domino": "Domino"}
TESTED = {"sglang": "SGLang 0.5.23", "vllm": "vLLM 0.32.0", "speculators": "vLLM 0.32.0"}


def model_card(
    form: DraftFormat, draft: DraftSpec, training: TrainingRecord | None, *, folder: str, dtype: str, assumed: bool
) -> str:
    """Markdown, with the front matter of model hubs. `assumed`: nobody says how many tokens are to be drafted."""
    target = PurePath(draft.target).name
    paper = PAPERS[draft.strategy]
    parts = [
        f"---\nbase_model: {json.dumps(target)}\ntags: [speculative-decoding, {draft.strategy}, {form.name}]\n---",
        f"# {NAMES[draft.strategy]} draft of {target}",
        f"For speculative decoding with {form.title}, written for {TESTED[form.name]} by lightning_dataflow. Algorithm: "
        f"[{paper}](https://arxiv.org/abs/{paper}). It drafts up to {draft.num_draft_tokens} tokens at a time; the output "
        "stays the target's own.",
        f"## Serve\n\n```\n{form.serve_command(draft, folder)}\n```",
        "## Network\n\n" + _table(_network(draft) | {"weights": dtype}),
        *_training(draft, training, assumed),
    ]
    return "\n\n".join(parts) + "\n"


def _network(draft: DraftSpec) -> dict[str, object]:
    network = draft.network
    rows: dict[str, object] = {
        "target layers read (0 is the first)": ", ".join(map(str, draft.layer_ids)),
        "hidden size": network.hidden_size,
        "heads, key-value heads, head size": f"{network.num_attention_heads}, {network.num_key_value_heads}, "
        f"{network.head_dim}",
    }
    if isinstance(network, Eagle3Config):
        rows["draft vocabulary"] = f"{network.draft_vocab_size} of {network.vocab_size}"
    if isinstance(network, BlockConfig):
        rows |= {"layers": network.num_layers, "block size": network.block_size, "mask token": network.mask_token_id}
        if network.sliding_window is not None:
            rows["sliding window"] = network.sliding_window
    if isinstance(network, DominoConfig):
        rows |= {"GRU size, rank": f"{network.gru_hidden_dim}, {network.emb_dim}", "shifted labels": network.shift_label}
    return rows


def _training(draft: DraftSpec, training: TrainingRecord | None, assumed: bool) -> list[str]:
    if training is None:
        text = "## Training\n\nConverted from another folder, which does not say how it was trained"
        if assumed and draft.strategy == "eagle3":  # of a block, it follows
            text += (
                f", nor how many tokens it is to draft at a time: {draft.num_draft_tokens} is lightning_dataflow's default"
            )
        return [f"{text}."]
    rows: dict[str, object] = {"optimizer steps": training.steps}
    if training.init_from is not None:
        rows["started from the draft"] = training.init_from
    if training.samples is not None:
        rows["samples"] = training.samples
    if training.global_batch_size is not None:
        rows["samples a step"] = training.global_batch_size
    if training.tokens is not None:
        rows["tokens"] = training.tokens
    if training.losses:
        rows["loss, first and last step"] = f"{training.losses[0]:.4g}, {training.losses[-1]:.4g}"
    rows |= {name: value for name, value in (("data", training.data), ("precision", training.precision)) if value}
    settings = {name: value for name, value in training.settings.items() if value is not None}
    parts = ["## Training\n\n" + _table(rows), "Settings:\n\n" + _table(settings)]
    if training.versions:
        parts.append("Trained with " + ", ".join(f"{name} {one}" for name, one in training.versions.items()) + ".")
    if not training.acceptance:
        return [*parts, "## Acceptance\n\nNot measured."]
    lines = [
        "| step | prompts | temperature | new tokens, at most | drafted at a time | acceptance length "
        "| accepted at least up to position 1, 2, … |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in training.acceptance:
        shares = [f"{share:.3f}" for share in one["acceptance_per_position"]]
        how = [one["step"], one["num_prompts"], *(one.get(name, "not recorded") for name in DECODING)]
        row = [*how, len(shares), f"{one['acceptance_length']:.3f}", ", ".join(shares)]
        lines.append(f"| {' | '.join(map(str, row))} |")
    note = "Mean tokens per verification on held-out prompts, by lightning_dataflow's own speculative decoding."
    return [*parts, f"## Acceptance\n\n{note}\n\n" + "\n".join(lines)]


def _table(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

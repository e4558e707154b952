"""How each family of golden cases is run through this package."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dataflow.contracts import StepContext
from lightning_dataflow.strategies.blocks.blocks import Blocks, cut_blocks
from lightning_dataflow.strategies.blocks.network import BlockConfig, BlockDraft
from lightning_dataflow.strategies.common.sums import ObjectiveSums
from lightning_dataflow.strategies.dflash.objective import DFlashObjective
from lightning_dataflow.strategies.domino.network import DominoConfig, DominoDraft
from lightning_dataflow.strategies.domino.objective import DominoObjective
from lightning_dataflow.strategies.eagle3.network import Eagle3Config, Eagle3Draft
from lightning_dataflow.strategies.eagle3.objective import Eagle3Objective, TargetRows


@dataclass
class Golden:
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        return {name.removeprefix("w."): value for name, value in self.tensors.items() if name.startswith("w.")}


Result = tuple[dict[str, Tensor], dict[str, Tensor]]


def run_eagle3(golden: Golden) -> Result:
    config, tensors = golden.config, golden.tensors
    hidden_size, heads = config["hidden_size"], config["num_attention_heads"]
    draft = Eagle3Draft(
        Eagle3Config(
            hidden_size=hidden_size,
            intermediate_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=hidden_size // heads,
            vocab_size=config["vocab_size"],
            draft_vocab_size=config["draft_vocab_size"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_theta"],
            train_embeddings=True,
        )
    )
    draft.load_state_dict(golden.weights())
    objective = Eagle3Objective(
        step_weight_base=config["step_weight_base"],
        lk_loss=config["lk_loss"],
        kl_scale=config["kl_scale"],
        kl_decay=config["kl_decay"],
    )
    # The inputs are aligned already: the state at row i supervises step k at row i − k.
    index = tensors["in.loss_mask"].flatten().nonzero().squeeze(-1)
    batch, length = tensors["in.input_ids"].shape
    normaliser = torch.tensor(float(batch * length))  # the golden losses divide by every position
    sums = draft(
        tensors["in.input_ids"],
        tensors["in.aux_hidden_states"],
        None,
        config["ttt_length"],
        lambda hidden, lm_head: objective(
            hidden,
            lm_head,
            last_hidden_state=tensors["in.last_hidden_state"],
            target_head=tensors["in.target_lm_head"],
            target_ids=draft.target_ids,
            t2d=draft.t2d,
            rows=TargetRows(teacher=index, student=index, room=index % length),
            normaliser=normaliser,
        ),
    )
    loss = sums.loss.numerator / sums.loss.denominator
    loss.backward()
    quotient = {name: one.numerator / one.denominator for name, one in sums.metrics.items()}
    outputs = {
        "loss": loss,
        "step_losses": quotient["loss_per_step"],
        "step_accuracy": quotient["accuracy"],
        "step_acceptance_rate": quotient["acceptance_rate"],
    }
    gradients = {name: parameter.grad for name, parameter in draft.named_parameters() if parameter.grad is not None}
    return outputs, gradients


def golden_blocks(golden: Golden) -> Blocks:
    """The valid blocks; here no others are ever drawn."""
    tensors = golden.tensors
    anchors = [row[valid] for row, valid in zip(tensors["in.anchors"], tensors["in.anchor_valid"], strict=True)]
    return cut_blocks(tensors["in.input_ids"], tensors["in.loss_mask"], anchors, golden.config["block_size"])


def dflash_config(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    same = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "mask_token_id", "block_size", "rms_norm_eps", "rope_theta",
    )  # fmt: skip
    return {
        **{name: config[name] for name in same},
        "num_layers": config["num_hidden_layers"],
        "num_aux_layers": len(config["target_layer_ids"]),
        "layer_types": tuple(config.get("layer_types", ())),
        "sliding_window": config.get("sliding_window"),
        **more,
    }


def run_dflash(golden: Golden) -> Result:
    config, tensors = golden.config, golden.tensors
    draft = BlockDraft(BlockConfig(**dflash_config(config)))
    draft.load_state_dict(golden.weights())
    blocks = golden_blocks(golden)
    objective = DFlashObjective(
        gamma=config["loss_decay_gamma"], dpace=config["loss_type"] == "dpace", dpace_alpha=config["dpace_alpha"]
    )
    seen = []

    def score(hidden: Tensor) -> ObjectiveSums:
        seen.append(hidden)
        return objective(hidden, tensors["in.target_lm_head"], blocks)

    sums = draft(tensors["in.aux_hidden_states"], tensors["in.target_embed_tokens"], blocks, score)
    outputs = block_outputs(sums, seen[0], golden)
    outputs["loss"].backward()
    return outputs, {name: parameter.grad for name, parameter in draft.named_parameters()}


def block_outputs(sums: ObjectiveSums, hidden: Tensor, golden: Golden) -> dict[str, Tensor]:
    accuracy, tensors = sums.metrics["accuracy"], golden.tensors
    every_block = tensors["out.draft_hidden"].clone()  # the invalid ones as they are
    every_block.view(-1, *hidden.shape[1:])[tensors["in.anchor_valid"].flatten()] = hidden.detach()
    return {
        "loss": sums.loss.numerator / sums.loss.denominator,
        "accuracy": accuracy.numerator / accuracy.denominator,
        "accuracy_denom": accuracy.denominator,
        "draft_hidden": every_block,
    }


def run_domino(golden: Golden) -> Result:
    config, tensors = golden.config, golden.tensors
    more = {name: config[name] for name in ("gru_hidden_dim", "emb_dim", "shift_label", "pure_draft_prefix_len")}
    draft = DominoDraft(DominoConfig(**dflash_config(config, **more)))
    draft.load_state_dict(golden.weights())
    blocks = golden_blocks(golden)
    # The golden λ is a constant: the schedule's value at step 0.
    objective = DominoObjective(
        gamma=config["loss_decay_gamma"], first_offset=draft.config.first_offset, lambda_start=config["lambda_base"]
    )
    start, seen = StepContext(global_step=0, total_steps=1), []

    def score(hidden: Tensor, features: Tensor, weight: Tensor) -> ObjectiveSums:
        seen.append(hidden)
        return objective(hidden, features, weight, tensors["in.target_lm_head"], blocks, start)

    sums = draft(tensors["in.aux_hidden_states"], tensors["in.target_embed_tokens"], blocks, score)
    outputs = block_outputs(sums, seen[0], golden)
    names = {"accept_len": "acceptance_length", "base_accept_len": "base_acceptance_length", "lambda_base": "base_share"}
    for name in ("final_loss", "base_loss", "base_accuracy", *names):
        one = sums.metrics[names.get(name, name)]
        outputs[name] = one.numerator / one.denominator
    outputs["loss"].backward()
    return outputs, {name: parameter.grad for name, parameter in draft.named_parameters()}


RUNNERS: dict[str, Callable[[Golden], Result]] = {"dflash": run_dflash, "domino": run_domino, "eagle3": run_eagle3}

"""How each family of golden cases is run through this package."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dataflow.models import Eagle3Config, Eagle3Draft
from lightning_dataflow.objectives import Eagle3Objective
from lightning_dataflow.objectives.eagle3 import TargetRows


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
            target_hidden_size=hidden_size,
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
            target_ids=draft.vocab.target_ids,
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


RUNNERS: dict[str, Callable[[Golden], Result]] = {"eagle3": run_eagle3}

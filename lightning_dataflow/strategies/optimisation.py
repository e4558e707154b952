"""AdamW with linear warm-up and cosine decay."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_dataflow.contracts import UserError


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> AdamW:
    """AdamW over named parameters; norms and biases do not decay. Names tell them apart, since FSDP1 flattens shapes.

    On GPUs it is fused, so that a step can be skipped there, see `skip_step_if`. On a CPU the fused kernel rounds
    differently from torch's default and saves nothing: the flag is on the host anyway.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters:
        owner = name.rpartition(".")[0].rpartition(".")[2]
        if parameter.requires_grad:
            (others if "norm" in owner or name.endswith("bias") else decaying).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = all(parameter.device.type == "cuda" for parameter in (*decaying, *others)) or None
    optimizer = AdamW(groups, lr=lr, betas=betas, fused=fused)
    # A fused AdamW can also unscale gradients, and Lightning then refuses to clip them: leave that to the GradScaler.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def warmup_cosine(optimizer: Optimizer, *, warmup_ratio: float, min_lr_ratio: float, total_steps: int) -> LambdaLR:
    """Warm up over `warmup_ratio` of `total_steps`, then follow a cosine down to `min_lr_ratio` of the peak."""
    if not 0 <= warmup_ratio < 1:
        raise UserError(f"warmup_ratio={warmup_ratio} is a share of max_steps: choose from 0 up to, not including, 1")
    warmup_steps = math.ceil(warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def skip_step_if(bad: torch.Tensor, optimizer: Optimizer) -> None:
    """Let the coming step of `optimizer` change no weight and no state if `bad`, a bool scalar on its device, is true.

    A fused optimizer reads the flag on its device. For any other, the host waits for it and takes the gradients away:
    torch's optimizers skip parameters without a gradient.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    elif bad.item():
        optimizer.zero_grad(set_to_none=True)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: torch.Tensor) -> None:
    """Multiply every gradient by a scalar on its device, shard by shard under FSDP2, without a host sync."""
    local = _local_gradients(parameters)
    if local:
        torch._foreach_mul_(local, factor.to(local[0].dtype))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The sum of the gradients' norms, of this rank's parts under sharding; a scalar on their device, without a host sync.

    Not less than the norm of all together. In float32 at least: squares of half-precision numbers would overflow.
    """
    local = _local_gradients(parameters)
    dtype = torch.promote_types(local[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(local, dtype=dtype)).sum().float()


def _local_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [getattr(gradient, "_local_tensor", gradient) for gradient in gradients]

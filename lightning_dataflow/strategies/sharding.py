"""How a draft is wrapped by Lightning's strategies."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


def full_state_dict(module: nn.Module, prefix: str) -> dict[str, Any]:
    """Unsharded tensors below `prefix`, on every rank. A collective under FSDP, whose root must be `module`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def fsdp1_root(model: Any) -> FullyShardedDataParallel | None:
    """`model` when FSDPStrategy wrapped it: such a root clips its own gradients."""
    return model if isinstance(model, FullyShardedDataParallel) else None

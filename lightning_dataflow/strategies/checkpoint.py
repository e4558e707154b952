"""A draft back from a Lightning checkpoint, full or sharded."""

from pathlib import Path

from lightning_dataflow.checkpoints.reading import read_header
from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.base import DraftModule
from lightning_dataflow.strategies.registry import resolve_strategy


def load_module(path: str | Path, *, target: str | None = None) -> DraftModule:
    """Rebuild the module that wrote a checkpoint, on the CPU, in evaluation.

    Args:
        path: a `.ckpt` file, or a folder of a sharded checkpoint.
        target: where the target is now, if it moved.

    Raises:
        UserError: no such checkpoint, not one of a draft, or one for another target.
    """
    path = Path(path)
    checkpoint = read_header(path)
    name = checkpoint["strategy"]
    hparams = {
        key: value for key, value in checkpoint["hyper_parameters"].items() if key != "_instantiator"
    }  # LightningCLI's
    hparams["target"] = target or hparams["target"]
    module = resolve_strategy(name).module(**hparams)
    if module.target_info.model_version != checkpoint["target_model_version"]:
        raise UserError(f"{path} was trained for another target than {hparams['target']}: name the one it was trained for")
    if path.is_dir():
        from torch.distributed import checkpoint as dcp

        state = {"state_dict": module.state_dict()}
        dcp.load(state, checkpoint_id=path, no_dist=True)
        module.load_state_dict(state["state_dict"])
    else:
        module.load_state_dict(checkpoint["state_dict"])
    module.on_load_checkpoint(checkpoint)
    return module.eval()

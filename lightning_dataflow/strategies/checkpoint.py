"""A draft back from a Lightning checkpoint, full or sharded, or from a folder for a serving engine."""

from pathlib import Path

import torch

from lightning_dataflow.checkpoints.reading import HEADER, read_header
from lightning_dataflow.contracts import UserError
from lightning_dataflow.formats import is_published, read_draft
from lightning_dataflow.strategies.base import DraftModule
from lightning_dataflow.strategies.eagle3 import Eagle3Module
from lightning_dataflow.strategies.registry import resolve_strategy
from lightning_dataflow.strategies.warm_start import EMBEDDING, same_tensor


def load_module(path: str | Path, *, target: str | None = None) -> DraftModule:
    """Rebuild the module that wrote a checkpoint, on the CPU, in evaluation.

    Args:
        path: a `.ckpt` file, the folder of a sharded checkpoint, or a published draft's folder.
        target: where the target is now, if it moved; a published draft's must be named.

    Raises:
        UserError: no such checkpoint, not one of a draft, or one for another target.
    """
    path = Path(path)
    if is_published(path) and not (path / HEADER).exists():
        return load_published(path, target=target)
    checkpoint = read_header(path)
    name = checkpoint["strategy"]
    hparams = {
        key: value for key, value in checkpoint["hyper_parameters"].items() if key != "_instantiator"
    }  # LightningCLI's
    hparams |= {"target": target or hparams["target"], "init_from": None}  # its sizes are in `network`
    module = resolve_strategy(name).module(**hparams)
    if module.target_info.model_version != checkpoint["target_model_version"]:
        raise UserError(f"{path} was trained for another target than {hparams['target']}: name the one it was trained for")
    if path.is_dir():
        from torch.distributed import checkpoint as dcp

        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        place = "model" if any(name.startswith("model.") for name in saved) else "state_dict"  # FSDP1's, or FSDP2's
        state = {place: module.state_dict()}
        dcp.load(state, checkpoint_id=path, no_dist=True)
        module.load_state_dict(state[place])
    else:
        module.load_state_dict(checkpoint["state_dict"])
    module.on_load_checkpoint(checkpoint)
    return module.eval()


def load_published(folder: str | Path, *, target: str | None) -> DraftModule:
    """The module of a published draft, ready to draft, to be exported, or to be trained on.

    Raises:
        UserError: no draft that a strategy here trains, or one of another target.
    """
    start = read_draft(folder)
    if target is None:
        raise UserError(f"{folder} does not hold its target: name it")
    module = resolve_strategy(start.strategy).module(target=target, init_from=str(folder))
    module.load_frozen_target(torch.device("cpu"))
    if start.strategy == "eagle3" and EMBEDDING in start.shapes:
        own = not same_tensor(start.tensor(EMBEDDING), module.frozen_target.embedding)
        module = Eagle3Module(target=target, init_from=str(folder), train_embeddings=own)
        module.load_frozen_target(torch.device("cpu"))
    module.load_start()
    return module.eval()

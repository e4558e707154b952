"""Loading a draft from a Lightning checkpoint, full or sharded, or from a folder for a serving engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dataflow.checkpoints.reading import HEADER, read_header
from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import first_line
from lightning_dataflow.strategies.module import DraftModule
from lightning_dataflow.strategies.published.reading import is_published, read_draft
from lightning_dataflow.strategies.registry import resolve_strategy
from lightning_dataflow.strategies.warm_start import check_finite, check_tensors

REMEDY = "name another checkpoint of its run"


def load_module(path: str | Path, *, target: str | None = None) -> DraftModule:
    """Rebuild the module that wrote a checkpoint, on the CPU, in evaluation.

    Args:
        path: a `.ckpt` file, the folder of a sharded checkpoint, or a published draft's folder.
        target: where the target is now, if it moved; a published draft's must be named.

    Raises:
        UserError: there is no such checkpoint, it is incomplete, or it is not one of a draft of this target.
        NotFiniteError: its weights hold NaN or infinity.
    """
    path = Path(path)
    if is_published(path) and not (path / HEADER).exists():
        return load_published(path, target=target)
    checkpoint = read_header(path)
    module = _rebuild(path, checkpoint, target)
    module.load_state_dict(_read_shards(path, module) if path.is_dir() else _read_file(path, module, checkpoint))
    try:
        module.on_load_checkpoint(checkpoint)
    except KeyError as error:  # an entry that a strategy adds to its weights
        raise _incomplete(path, str(error.args[0])) from error
    check_finite(path, module.state_dict(), REMEDY)
    return module.eval()


def load_published(folder: str | Path, *, target: str | None) -> DraftModule:
    """The module of a published draft, ready to draft, to be exported, or to be trained further.

    Raises:
        UserError: no strategy here trains such a draft, or it is a draft of another target.
    """
    start = read_draft(folder)
    if target is None:
        raise UserError(f"{folder} does not hold its target: name it (--target FOLDER, or target.path)")
    spec = resolve_strategy(start.strategy)
    assert spec.export is not None, "read_draft found it by its export"
    module: DraftModule = spec.module(target=target, init_from=str(folder))
    module.load_frozen_target(torch.device("cpu"))
    if settings := spec.export.settings(start, module.frozen_target):
        module = spec.module(target=target, init_from=str(folder), **settings)
        module.load_frozen_target(torch.device("cpu"))
    module.load_start()
    return module.eval()


def _rebuild(path: Path, checkpoint: Mapping[str, Any], target: str | None) -> DraftModule:
    """The module of a checkpoint's settings, for the target that it was trained for."""
    name = checkpoint["strategy"]
    hparams = dict(checkpoint["hyper_parameters"])
    hparams.pop("_instantiator", None)  # LightningCLI's
    if "target" not in hparams or "target_model_version" not in checkpoint:
        raise _incomplete(path, "the name of its target")
    hparams |= {"target": target or hparams["target"], "init_from": None}  # its sizes are in `network`
    if "rope_theta" in (saved := checkpoint.get("identity", {})) and "rope_scaling" not in saved:
        hparams["network"] = {**(hparams.get("network") or {}), "rope_scaling": None}  # release 0.1 trained without any
    try:
        module: DraftModule = resolve_strategy(name).module(**hparams)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise UserError(
            f"{path} has settings of another {name} ({str(error).split('() ')[-1]}): read it with the version of this "
            "package, or of your own strategy, that wrote it"
        ) from error
    if not module.target_info.has_version(checkpoint["target_model_version"]):
        raise UserError(f"{path} was trained for another target than {hparams['target']}: name the one it was trained for")
    return module


def _read_shards(path: Path, module: DraftModule) -> dict[str, Any]:
    """The weights in a folder."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    place = "model" if any(name.startswith("model.") for name in saved) else "state_dict"  # FSDP1's, or FSDP2's
    prefix = f"{place}."
    weights = {name.removeprefix(prefix): entry for name, entry in saved.items() if name.startswith(prefix)}
    shapes = {name: getattr(entry, "size", ()) for name, entry in weights.items()}
    _check_weights(path, module, shapes)
    state = {place: module.state_dict()}
    try:
        dcp.load(state, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:  # torch's; it is not an Exception
        reasons = [first_line(cause) for cause, _ in error.failures.values()]
        raise UserError(f"{path} cannot be read ({', '.join(reasons)}): {REMEDY}") from error
    return state[place]


def _read_file(path: Path, module: DraftModule, checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights in a file."""
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        raise _incomplete(path, "state_dict")
    _check_weights(path, module, {name: getattr(entry, "shape", ()) for name, entry in state.items()})
    return state


def _check_weights(path: Path, module: DraftModule, shapes: Mapping[str, Sequence[int]]) -> None:
    check_tensors(path, shapes, module.state_dict(), f"{module.strategy_name} draft with its settings", REMEDY)


def _incomplete(path: Path, what: str) -> UserError:
    return UserError(f"{path} lacks {what}: it is not a whole draft, {REMEDY}")

"""Starting a draft from a published draft: what must agree, and the tensors that are copied."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dataflow.contracts import NotFiniteError, UserError
from lightning_dataflow.data.finite import first_not_finite
from lightning_dataflow.strategies.common.target_tensors import EMBEDDING, HEAD, FrozenTarget, same_tensor
from lightning_dataflow.strategies.published.contract import DraftExport, PublishedDraft
from lightning_dataflow.targets.info import TargetInfo

VOCAB_MAPS = ("d2t", "t2d")
"""Maps of a reduced vocabulary. Other tools write them also where they are the identity."""


def check_start(start: PublishedDraft, strategy: str, target: TargetInfo) -> None:
    """Raise UserError when a published draft is of another strategy or another target than this training."""
    if start.strategy != strategy:
        raise UserError(
            f"{start.folder} holds a draft of {start.strategy}, not one of {strategy}: set strategy={start.strategy}"
        )
    highest = max(start.layer_ids or (0,))
    for what, actual, expected in (
        ("hidden size", start.target_hidden_size, target.hidden_size),
        ("hidden size of the draft", start.hidden_size, target.hidden_size),
        ("vocabulary", start.vocab_size, target.vocab_size),
        ("number of layers", start.num_target_layers or target.num_layers, target.num_layers),
        ("highest layer", highest, min(highest, target.num_layers - 1)),
    ):
        if actual != expected:
            raise UserError(
                f"{start.folder} is a draft of another target ({what} {actual}, {target.path} has {expected}): name the "
                "target that it was made for"
            )


def choose_layers(start: PublishedDraft, chosen: list[int] | None) -> list[int] | None:
    """The layers that settings and the published draft agree on; None where neither names any. Raises UserError where they
    differ."""
    if start.layer_ids is None:
        return chosen
    if chosen and sorted(chosen) != sorted(start.layer_ids):
        layers = sorted(start.layer_ids)
        raise UserError(
            f"{start.folder} reads the target's layers {layers}, these settings say {sorted(chosen)}: set "
            f"'strategy.layer_ids={layers}', or leave it out"
        )
    return list(start.layer_ids)


def check_settings(start: PublishedDraft, settings: Mapping[str, Any]) -> None:
    """Raise UserError naming the settings that ask for other sizes than the published draft has."""
    network = start.network
    differing = [name for name, value in settings.items() if network.get(name, value) != value]
    if differing:
        have = ", ".join(f"{name}={settings[name]}" for name in differing)
        want = " ".join(f"strategy.{name}={network[name]}" for name in differing)
        raise UserError(f"{start.folder} is a draft of other sizes than these settings say ({have}): set {want}")


def check_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    wanted: Mapping[str, Tensor],
    draft: str,
    remedy: str,
    optional: Collection[str] = (),
) -> None:
    """Raise UserError unless `path` holds exactly the `wanted` tensors, apart from `optional` ones, in their shapes."""
    if missing := sorted(wanted.keys() - shapes.keys() - set(optional)):
        raise UserError(f"{path} lacks {some(missing)}: it is not a whole {draft}, {remedy}")
    if unknown := sorted(shapes.keys() - wanted.keys() - set(optional)):
        raise UserError(f"{path} has {some(unknown)}, for which no {draft} has a place: {remedy}")
    for name in wanted.keys() & shapes.keys():
        if tuple(shapes[name]) != tuple(wanted[name].shape):
            raise UserError(f"{path}: {name} is {list(shapes[name])}, any {draft} has {list(wanted[name].shape)}: {remedy}")


def check_finite(path: Path, tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Raise NotFiniteError naming the first of a draft's tensors that holds NaN or infinity."""
    if name := first_not_finite(tensors):
        raise NotFiniteError(f"{path}: {name} holds NaN or infinity, so the draft cannot be used: {remedy}")


@torch.no_grad()
def load_start(start: PublishedDraft, export: DraftExport, draft: nn.Module, target: FrozenTarget) -> None:
    """Copy a published draft's tensors into `draft`. Tensors that the folder leaves to the target come from the target.

    Raises:
        UserError: it is incomplete or another network; it has an embedding or head of its own where this draft uses the
            target's; or its vocabulary map is invalid.
        NotFiniteError: it holds NaN or infinity.
    """
    stored, state = start.tensors(), draft.state_dict()
    optional = {EMBEDDING, HEAD, *VOCAB_MAPS} - state.keys() | export.implied(draft.config)
    kind = f"{start.strategy} draft with its config.json"
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    check_tensors(start.folder, shapes, state, kind, "it is another network", optional)
    check_finite(start.folder, stored, "name another")
    of_target = {EMBEDDING: target.embedding, HEAD: target.head}
    for name in of_target.keys() & stored.keys() - state.keys():
        if not same_tensor(stored[name], of_target[name]):
            raise UserError(f"{start.folder} has a {name} of its own, unlike the target's: {export.own_tensor_remedy}")
    for name, source in {**of_target, **stored}.items():
        if name in state:
            state[name].copy_(source)
    export.complete(start, draft)


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first few names, for an error message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

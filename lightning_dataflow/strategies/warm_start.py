"""Starting a draft from a published one: what must fit, and the tensors that are copied."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

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
    for what, found, wanted in (
        ("hidden size", start.target_hidden_size, target.hidden_size),
        ("hidden size of the draft", start.hidden_size, target.hidden_size),
        ("vocabulary", start.vocab_size, target.vocab_size),
        ("number of layers", start.num_target_layers or target.num_layers, target.num_layers),
        ("highest layer", highest, min(highest, target.num_layers - 1)),
    ):
        if found != wanted:
            raise UserError(
                f"{start.folder} is a draft of another target ({what} {found}, {target.path} has {wanted}): name the "
                "target that it was made for"
            )


def choose_layers(start: PublishedDraft, chosen: list[int] | None) -> list[int] | None:
    """Layers that the settings name, else those of the published draft; None where neither says. Raises UserError where
    they differ."""
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
    differing = [name for name, value in settings.items() if value is not None and network.get(name, value) != value]
    if differing:
        have = ", ".join(f"{name}={settings[name]}" for name in differing)
        want = " ".join(f"strategy.{name}={network[name]}" for name in differing)
        raise UserError(f"{start.folder} is a draft of other sizes than these settings say ({have}): set {want}")


def check_tensors(start: PublishedDraft, export: DraftExport, draft: nn.Module) -> None:
    """Raise UserError unless every tensor of `draft` is in the folder or follows from the target, and none is left over."""
    wanted = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    missing = sorted(wanted.keys() - start.shapes.keys() - export.implied(draft.config))
    if missing:
        raise UserError(f"{start.folder} lacks {some(missing)}: it is not a whole {start.strategy} draft")
    unknown = sorted(start.shapes.keys() - wanted.keys() - {EMBEDDING, HEAD, *VOCAB_MAPS})
    if unknown:
        raise UserError(
            f"{start.folder} has {some(unknown)}, for which a draft of {start.strategy} with that config.json has no "
            "place: it is another network"
        )
    for name, shape in wanted.items():
        found = start.shapes.get(name, shape)
        if found != shape:
            raise UserError(f"{start.folder}: {name} is {list(found)}, its config.json says {list(shape)}")


@torch.no_grad()
def load_start(start: PublishedDraft, export: DraftExport, draft: nn.Module, target: FrozenTarget) -> None:
    """Copy a published draft's tensors into `draft`. What it leaves to the target comes from there.

    Raises:
        UserError: it is not whole, or another network; it has an embedding or head of its own where this draft uses the
            target's; or no sensible vocabulary map.
        NotFiniteError: it holds NaN or infinity.
    """
    check_tensors(start, export, draft)
    if broken := next((name for name in start.shapes if first_not_finite({name: start.tensor(name)})), None):
        raise NotFiniteError(f"{start.folder}: {broken} holds NaN or infinity, so it is no draft to use: name another")
    state = draft.state_dict()
    for name, ours in (EMBEDDING, target.embedding), (HEAD, target.head):
        if name in start.shapes and name not in state and not same_tensor(start.tensor(name), ours):
            raise UserError(f"{start.folder} has a {name} of its own, unlike the target's: {export.own_tensor_remedy}")
    for name, tensor in state.items():
        if name in start.shapes:
            tensor.copy_(start.tensor(name))
        elif name == EMBEDDING:
            tensor.copy_(target.embedding)
        elif name == HEAD:
            tensor.copy_(target.head)
    export.complete(start, draft)


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first few, for an error's line."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

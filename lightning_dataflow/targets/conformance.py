"""Whether an engine returns what another one does: every token, the right layers, the right norm."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.targets.base import TargetEngine

LENGTHS = (1, 2, 7, 33, 128, 300)
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.02}
"""Largest relative error of a token: the length of the difference to the reference's state over that of the state."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt in both engines.

    Attributes:
        together: whether it was asked for along with the other prompts.
        differences: by feature (`layer 3`, `last`): (largest difference, largest relative error of a token).
        problems: what is wrong, in words; empty where the engines agree.
    """

    num_tokens: int
    together: bool
    dtype: str
    differences: dict[str, tuple[float, float]]
    problems: tuple[str, ...]


def make_prompts(vocab_size: int, longest: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Random prompts of these lengths, none longer than `longest`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths if length <= longest]


def compare_engines(reference: TargetEngine, other: TargetEngine, prompts: Sequence[Sequence[int]]) -> list[Comparison]:
    """Capture `prompts` with both, one by one and then all at once.

    Args:
        reference: with *all* layers of the target captured, so that a wrong layer can be named.
    """
    if len(reference.layer_ids) != reference.info.num_layers:
        raise UserError("the reference engine of a comparison captures all layers: set_capture_layers(range(num_layers))")
    expected = [reference.capture([prompt])[0] for prompt in prompts]
    alone = [other.capture([prompt])[0] for prompt in prompts]
    together = other.capture(prompts)
    return [
        _compare(want, found, other, is_together)
        for is_together, captured in ((False, alone), (True, together))
        for want, found in zip(expected, captured, strict=True)
    ]


def table(comparisons: Sequence[Comparison]) -> str:
    """For people: largest differences, and in brackets the largest relative error of a token."""
    names = list(comparisons[0].differences)
    rows = [["tokens", "asked for", "dtype", *names, "verdict"]]
    for one in comparisons:
        cells = [f"{largest:.1e} ({error:.0e})" for largest, error in one.differences.values()]
        verdict = "; ".join(one.problems) or "the same"
        rows.append([str(one.num_tokens), "together" if one.together else "alone", one.dtype, *cells, verdict])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _compare(
    want: dict[str, torch.Tensor], found: dict[str, torch.Tensor], other: TargetEngine, together: bool
) -> Comparison:
    size = other.info.hidden_size
    states = dict(enumerate(want["aux_hidden_states"].float().split(size, dim=-1)))
    length = len(want["last_hidden_state"])
    pieces = found["aux_hidden_states"].float().split(size, dim=-1)
    problems: list[str] = []
    differences: dict[str, tuple[float, float]] = {}
    tolerance = TOLERANCES[other.dtype]
    if len(pieces) != len(other.layer_ids):
        problems.append(f"{len(pieces)} layers instead of {len(other.layer_ids)}")
    for layer, piece in zip(other.layer_ids, pieces, strict=False):
        name = f"layer {layer}"
        differences[name], problem = _difference(states[layer], piece, tolerance)
        closest = min(states, key=lambda one: _error(states[one], piece))
        if not problem.startswith("lacks") and _error(states[closest], piece) < _error(states[layer], piece):
            problem = f"is layer {closest}"
        if problem:
            problems.append(f"{name} {problem}")
    last = found["last_hidden_state"].float()
    want_last = want["last_hidden_state"].float()
    differences["last"], problem = _difference(want_last, last, tolerance)
    if _error(states[max(states)], last) < _error(want_last, last):
        problem = "is before the final norm"
    if problem:
        problems.append(f"last {problem}")
    return Comparison(
        num_tokens=length,
        together=together,
        dtype=str(found["last_hidden_state"].dtype).removeprefix("torch."),
        differences=differences,
        problems=tuple(problems),
    )


def _difference(want: torch.Tensor, found: torch.Tensor, tolerance: float) -> tuple[tuple[float, float], str]:
    """((largest difference, largest relative error of a token), what is wrong)."""
    nothing = float("inf"), float("inf")
    missing = len(want) - len(found)
    if missing > 0 and len(found):
        if _error(want[missing:], found) <= tolerance:
            return nothing, f"lacks the first {missing} of {len(want)} tokens"
        if _error(want[: len(found)], found) <= tolerance:
            return nothing, f"lacks the last {missing} of {len(want)} tokens"
    if want.shape != found.shape:
        return nothing, f"has shape {list(found.shape)} instead of {list(want.shape)}"
    error = _error(want, found)
    return ((want - found).abs().max().item(), error), "" if error <= tolerance else "differs"


def _error(want: torch.Tensor, found: torch.Tensor) -> float:
    """Infinite for other shapes."""
    if want.shape != found.shape:
        return float("inf")
    return ((want - found).norm(dim=-1) / want.norm(dim=-1)).max().item()

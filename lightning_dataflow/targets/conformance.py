"""Compares two engines: every token, the right layers, the right norm."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.stores.base import dtype_name
from lightning_dataflow.targets.base import TargetEngine

LENGTHS = (1, 2, 7, 33, 128, 300)
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.02}
"""Largest relative error of a token: the norm of the difference to the reference's state over the norm of that state."""

Features = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt in both engines.

    Attributes:
        together: whether all prompts were captured at once.
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
    """Capture `prompts` with both engines, one by one and then all at once.

    Args:
        reference: with *all* layers of the target captured, so that a wrong layer can be named.
    """
    if len(reference.layer_ids) != reference.info.num_layers:
        raise UserError("the reference engine of a comparison captures all layers: set_capture_layers(range(num_layers))")
    expected = [reference.capture([prompt])[0] for prompt in prompts]
    alone = [other.capture([prompt])[0] for prompt in prompts]
    together = other.capture(prompts)
    return [
        _compare(*pair, other, is_together)
        for is_together, captured in ((False, alone), (True, together))
        for pair in zip(expected, captured, strict=True)
    ]


def table(comparisons: Sequence[Comparison]) -> str:
    """The largest differences, and in brackets the largest relative error of a token."""
    names = list(comparisons[0].differences)
    rows = [["tokens", "asked for", "dtype", *names, "verdict"]]
    for comparison in comparisons:
        cells = [f"{largest:.1e} ({error:.0e})" for largest, error in comparison.differences.values()]
        verdict = "; ".join(comparison.problems) or "the same"
        asked = "together" if comparison.together else "alone"
        rows.append([str(comparison.num_tokens), asked, comparison.dtype, *cells, verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _compare(expected: Features, captured: Features, other: TargetEngine, together: bool) -> Comparison:
    size, tolerance = other.info.hidden_size, TOLERANCES[other.dtype]
    states, found = _states(expected, range(other.info.num_layers), size), _states(captured, other.layer_ids, size)
    problems: list[str] = []
    differences: dict[str, tuple[float, float]] = {}
    if len(found) != len(other.layer_ids) + 1:
        problems.append(f"{len(found) - 1} layers instead of {len(other.layer_ids)}")
    for name, state in found.items():
        differences[name], problem = _difference(states[name], state, tolerance)
        closest = min(states, key=lambda candidate: _error(states[candidate], state))
        if _error(states[closest], state) < _error(states[name], state):
            problem = f"is {closest}" if name != "last" else f"is {closest}, before the final norm"
        if problem:
            problems.append(f"{name} {problem}")
    return Comparison(
        num_tokens=len(states["last"]),
        together=together,
        dtype=dtype_name(captured["last_hidden_state"].dtype),
        differences=differences,
        problems=tuple(problems),
    )


def _states(features: Features, layer_ids: Sequence[int], size: int) -> Features:
    """Each captured state by its name."""
    pieces = features["aux_hidden_states"].float().split(size, dim=-1)
    layers = {f"layer {layer}": piece for layer, piece in zip(layer_ids, pieces, strict=False)}
    return layers | {"last": features["last_hidden_state"].float()}


def _difference(expected: torch.Tensor, captured: torch.Tensor, tolerance: float) -> tuple[tuple[float, float], str]:
    """((largest difference, largest relative error of a token), what is wrong)."""
    missing, error = len(expected) - len(captured), _error(expected, captured)
    if error != float("inf"):
        return ((expected - captured).abs().max().item(), error), "" if error <= tolerance else "differs"
    problem = f"has shape {list(captured.shape)} instead of {list(expected.shape)}"
    if missing > 0 and len(captured):
        for where, part in (("first", expected[missing:]), ("last", expected[: len(captured)])):
            if _error(part, captured) <= tolerance:
                problem = f"lacks the {where} {missing} of {len(expected)} tokens"
                break
    return (error, error), problem


def _error(expected: torch.Tensor, captured: torch.Tensor) -> float:
    """Infinite for other shapes."""
    if expected.shape != captured.shape:
        return float("inf")
    return ((expected - captured).norm(dim=-1) / expected.norm(dim=-1)).max().item()

"""Figures of a run and of measured drafts. They need matplotlib, which is an extra."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def can_draw() -> bool:
    """Whether matplotlib is installed; if not, say how to install it."""
    if find_spec("matplotlib") is not None:
        return True
    print("no figure was drawn: it needs matplotlib, pip install 'lightning-dataflow[plots]'", flush=True)
    return False


def draw_result(result: dict[str, Any], figure_file: Path) -> bool:
    """Draw the loss by step, and the share of drafts accepted: by position for the first and last evaluation, and by step
    if there are more. Returns whether it was drawn."""
    if not can_draw():
        return False
    evaluations = result.get("acceptance", [])
    figure, (loss_axes, *axes) = _panels(1 + bool(evaluations) + (len(evaluations) > 2))
    loss_axes.plot(range(1, len(result["losses"]) + 1), result["losses"])
    loss_axes.set(xlabel="optimizer step", ylabel="loss", title=f"{result['strategy']} training loss")
    loss_axes.xaxis.get_major_locator().set_params(integer=True)
    if evaluations:
        shown = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
        _by_position(axes[0], shown, "held-out prompts, real decoding")
    if len(evaluations) > 2:
        _by_step(axes[1], evaluations)
    figure.savefig(figure_file, dpi=120)
    return True


def draw_measurements(measurements: Sequence[dict[str, Any]], figure_file: Path) -> None:
    """Draw the share of drafts accepted by position, and by step of the training if several steps were measured."""
    if not can_draw():
        return
    by_step = [each for each in measurements if each["step"] is not None]
    several = len({each["step"] for each in by_step}) > 1
    figure, axes = _panels(1 + several)
    _by_position(
        axes[0], measurements, f"{measurements[0]['num_prompts']} prompts, decoded by {measurements[0]['backend']}"
    )
    if several:
        _by_step(axes[1], by_step)
    figure.savefig(figure_file, dpi=120)


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _by_position(axes: Any, evaluations: Sequence[dict[str, Any]], title: str) -> None:
    width = 0.8 / len(evaluations)
    for index, evaluation in enumerate(evaluations):
        shares = evaluation["acceptance_per_position"]
        places = [position + 1 + width * (index + 0.5) - 0.4 for position in range(len(shares))]
        name = evaluation.get("name", "draft") if evaluation["step"] is None else f"step {evaluation['step']}"
        axes.bar(places, shares, width=width, label=f"{name}: length {evaluation['acceptance_length']:.2f}")
    axes.set(xlabel="draft position", ylabel="share of drafts accepted", title=title)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(1, len(evaluations[0]["acceptance_per_position"]) + 1))
    axes.legend()


def _by_step(axes: Any, evaluations: Sequence[dict[str, Any]]) -> None:
    steps = [evaluation["step"] for evaluation in evaluations]
    for position in range(len(evaluations[0]["acceptance_per_position"])):
        shares = [evaluation["acceptance_per_position"][position] for evaluation in evaluations]
        axes.plot(steps, shares, marker="o", markersize=3, label=f"position {position + 1}")
    axes.set(xlabel="optimizer step", ylabel="share of drafts accepted", title="by checkpoint")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small")

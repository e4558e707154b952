"""One picture of a run."""

import json
from pathlib import Path


def draw_result(result_file: Path, figure_file: Path) -> None:
    """Draw the loss by step, and the share of drafts accepted by position for the first and last evaluation."""
    from matplotlib.figure import Figure

    result = json.loads(result_file.read_text())
    evaluations = result.get("acceptance", [])
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accepted_axes = figure.subplots(1, 2)
    loss_axes.plot(range(1, len(result["losses"]) + 1), result["losses"])
    loss_axes.set(xlabel="optimizer step", ylabel="loss", title=f"{result['strategy']} training loss")
    shown = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
    for index, evaluation in enumerate(shown):
        shares = evaluation["acceptance_per_position"]
        places = [position + 1 + 0.4 * index - 0.2 for position in range(len(shares))]
        label = f"step {evaluation['step']}: length {evaluation['acceptance_length']:.2f}"
        accepted_axes.bar(places, shares, width=0.4, label=label)
    accepted_axes.set(xlabel="draft position", ylabel="share of drafts accepted", title="held-out prompts, real decoding")
    accepted_axes.set_ylim(0, 1)
    if shown:
        accepted_axes.set_xticks(range(1, len(shown[0]["acceptance_per_position"]) + 1))
        accepted_axes.legend()
    figure.savefig(figure_file, dpi=120)

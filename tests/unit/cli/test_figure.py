"""Pictures of runs and measurements."""

import pytest
from matplotlib.figure import Figure

from lightning_dataflow.cli.figure import draw_measurements, draw_result


@pytest.fixture
def drawn(monkeypatch):
    """The figure that was saved last."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


def measured(step: int | None, *shares: float) -> dict:
    return {
        "step": step,
        "name": "draft",
        "acceptance_per_position": list(shares),
        "acceptance_length": 1 + sum(shares),
        "num_prompts": 2,
        "backend": "hf",
    }


@pytest.mark.parametrize(("num_evaluations", "num_panels"), [(0, 1), (1, 2), (2, 2), (3, 3)])
def test_a_result_has_no_empty_panel(tmp_path, drawn, num_evaluations, num_panels):
    acceptance = [measured(step, 0.5, 0.25) for step in range(num_evaluations)]
    result = {"losses": [3.0, 2.0, 1.0], "strategy": "eagle3", "acceptance": acceptance}
    draw_result(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert len(drawn[0].axes) == num_panels
    assert all(axes.has_data() for axes in drawn[0].axes)


def test_without_matplotlib_a_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning_dataflow.cli.figure.find_spec", lambda name: None)
    assert not draw_result({}, tmp_path / "figure.png")
    assert capsys.readouterr().out == (
        "no figure was drawn: it needs matplotlib, pip install 'lightning-dataflow[plots]'\n"
    )
    draw_measurements([measured(1, 0.5)], tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_steps_are_whole_numbers(tmp_path, drawn):
    draw_measurements([measured(1, 0.5), measured(2, 0.75)], tmp_path / "figure.png")
    assert [tick for tick in drawn[0].axes[1].get_xticks() if tick % 1] == []

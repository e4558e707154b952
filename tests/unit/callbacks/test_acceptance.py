"""What follows a measurement while training: loggers, and checkpoints of the best."""

import csv

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_dataflow.callbacks import AcceptanceEvaluation, acceptance
from lightning_dataflow.checkpoints.markers import incomplete, latest_checkpoint
from lightning_dataflow.checkpoints.trainer import DataFlowTrainer
from lightning_dataflow.evaluation.acceptance import AcceptanceReport
from tests.unit.strategies.fits import make_data, make_module


@pytest.fixture
def fit(prompts, target, target_path, tmp_path, monkeypatch):
    """fit(accepted, max_steps, callbacks) → the module and the measurements; of ten drafts, `accepted[n]` in the n-th."""

    def call(accepted, max_steps, *callbacks, ckpt_path=None, **options):
        left = iter(accepted)
        monkeypatch.setattr(acceptance, "evaluate_acceptance", lambda *_, **__: report(next(left)))
        evaluation = AcceptanceEvaluation(lambda: target, [[1, 2]], num_draft_tokens=2, max_new_tokens=7, every_n_steps=3)
        data, module = make_data(prompts, target, micro_batch_size=4), make_module(target_path)
        fitting = {"max_steps": max_steps, "max_epochs": 1, "limit_train_batches": max_steps, "accumulate_grad_batches": 1}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = DataFlowTrainer(
            accelerator="cpu", default_root_dir=tmp_path, callbacks=[evaluation, *callbacks], **quiet | fitting | options
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        assert next(left, None) is None
        return module, evaluation.history

    return call


def report(accepted):
    return AcceptanceReport(
        num_prompts=1, num_tokens=20, num_drafts=10, accepted_per_position=(accepted, accepted // 2), seconds=1.0
    )


def best(folder, every_n_train_steps=3, **options):
    options = {"monitor": "val/acceptance_length", "mode": "max"} | options
    name = {"filename": "best-step-{step:06d}", "auto_insert_metric_name": False}
    return ModelCheckpoint(folder, every_n_train_steps=every_n_train_steps, **name, **options)


def saved(folder):
    return sorted(path.name for path in folder.glob("*.ckpt"))


@pytest.mark.integration
def test_the_last_measurement_may_be_the_best(fit, tmp_path):
    """3 does not divide 4: ModelCheckpoint leaves the last step out, and the last step is measured."""
    follower = best(tmp_path)
    module, history = fit([0, 4, 6], 4, follower)
    assert [one["step"] for one in history] == [0, 3, 4]
    assert saved(tmp_path) == ["best-step-000004.ckpt"]
    assert (follower.best_model_path, float(follower.best_model_score)) == (
        str(tmp_path / "best-step-000004.ckpt"),
        pytest.approx(1.9),
    )
    assert incomplete(tmp_path / "best-step-000004.ckpt") is None
    assert latest_checkpoint(tmp_path) == tmp_path / "best-step-000004.ckpt"

    whole, _ = fit([0, 4, 6, 5], 7, best(tmp_path / "whole"))
    resumed, history = fit([6, 6, 5], 7, best(tmp_path), ckpt_path=tmp_path / "best-step-000004.ckpt")
    assert resumed.step_losses[:4] == module.step_losses
    assert len(resumed.step_losses) == len(whole.step_losses) == 7
    assert [one["step"] for one in history] == [0, 3, 4, 6, 7]
    assert saved(tmp_path) == ["best-step-000004.ckpt"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("accepted", "max_steps", "options", "kept"),
    [
        ([0, 6, 4], 4, {}, [3]),
        ([0, 6, 6], 4, {}, [3]),
        ([0, 6, 4], 4, {"save_top_k": 2}, [3, 4]),
        ([0, 6, 4], 4, {"save_top_k": -1}, [3, 4]),
        ([0, 4, 6], 6, {"save_top_k": -1}, [3, 6]),
        ([0, 4, 6], 4, {"monitor": "val/accepted_1"}, [4]),
        ([0, 4, 6], 4, {"monitor": "step"}, [3]),
        ([0, 4, 6], 4, {"monitor": "val/loss"}, []),  # which nobody logs
    ],
)
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_it_is_considered_once_and_by_those_that_follow_it(fit, tmp_path, accepted, max_steps, options, kept):
    fit(accepted, max_steps, best(tmp_path, **options))
    assert saved(tmp_path) == [f"best-step-{step:06d}.ckpt" for step in kept]


class Heard(Logger):
    """Some other logger."""

    name = version = "heard"

    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))


@pytest.mark.integration
def test_every_measurement_is_logged_once_at_its_step(fit, tmp_path):
    """The first too, and those between the steps at which Lightning logs."""
    heard = Heard()
    _, history = fit([1, 4, 6], 5, logger=[heard, CSVLogger(tmp_path, "csv", "0")], log_every_n_steps=2)
    measured = [(step, metrics) for step, metrics in heard.metrics if "val/acceptance_length" in metrics]
    assert [step for step, _ in measured] == [one["step"] for one in history] == [0, 3, 5]
    for (_, metrics), one in zip(measured, history, strict=True):
        assert metrics == {
            "val/acceptance_length": one["acceptance_length"],
            "val/tokens_per_target_forward": one["tokens_per_target_forward"],
            "val/accepted_0": one["acceptance_per_position"][0],
            "val/accepted_1": one["acceptance_per_position"][1],
        }
    assert (history[0]["temperature"], history[0]["max_new_tokens"]) == (0.0, 7)
    rows = list(csv.DictReader((tmp_path / "csv" / "0" / "metrics.csv").open()))
    lengths = {int(row["step"]): float(row["val/acceptance_length"]) for row in rows if row["val/acceptance_length"]}
    assert lengths == pytest.approx({0: 1.1, 3: 1.6, 5: 1.9})
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [1, 3]

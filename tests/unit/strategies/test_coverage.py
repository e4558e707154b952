"""A cut vocabulary without the tokens that the target predicts is noticed in the first windows."""

import logging
import math
import re

import lightning as L
import pytest
import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.data import DataFlowDataModule
from lightning_dataflow.producers import OnlineSource
from lightning_dataflow.strategies.eagle3.coverage import NUM_WINDOWS, CoverageCheck
from lightning_dataflow.strategies.eagle3.module import Eagle3Module


@pytest.mark.parametrize(
    ("shares", "level", "text"),
    [
        ([0.4, 0.0], "INFO", "has 80.0 % of the tokens that the target predicts, in the first 2 steps"),
        ([1.0, 0.0], "WARNING", "has 50.0 % of the tokens .* in the first 2 steps: raise strategy.draft_vocab_size"),
        ([math.nan, 0.2, 0.0], "INFO", "has 90.0 % of the tokens that the target predicts"),
        ([0.0] * NUM_WINDOWS + [1.0] * 9, "INFO", f"has 100.0 % .* in the first {NUM_WINDOWS} steps$"),
    ],
)
def test_the_mean_of_the_first_windows_is_logged_once(caplog, shares, level, text):
    check = CoverageCheck()
    with caplog.at_level(logging.INFO):
        for share in shares:
            check.add(torch.tensor(share))
        check.finish()
        check.finish()
    (record,) = caplog.records
    assert record.levelname == level
    assert re.search(text, record.getMessage())


def test_fits_of_bad_steps_only_measure_nothing(caplog):
    check = CoverageCheck()
    with caplog.at_level(logging.INFO):
        for _ in range(NUM_WINDOWS):
            check.add(torch.tensor(math.nan))
    assert not caplog.records


@pytest.mark.integration
def test_a_bad_step_does_not_count(target_path):
    module = Eagle3Module(str(target_path), draft_vocab_size=64)
    module._coverage = CoverageCheck()
    for loss, outside in ((math.nan, 0.0), (1.0, 1.0), (math.inf, 0.0)):
        module.judge_means({"loss": torch.tensor(loss), "outside_vocab": torch.tensor(outside)})
    with pytest.raises(UserError, match="no token that the target predicts in the first 3 steps"):
        module._coverage.finish()


@pytest.mark.integration
def test_a_vocabulary_that_the_target_never_predicts_ends_the_fit(target_path, target, prompts, tmp_path, monkeypatch):
    features = target.capture([list(prompt.input_ids) for prompt in prompts[0]])
    head = target.model.get_output_embeddings().weight
    predicted = torch.cat([(sample["last_hidden_state"] @ head.T).argmax(-1) for sample in features]).unique()
    never = torch.tensor(sorted(set(range(len(head))) - set(predicted.tolist())))
    module = Eagle3Module(str(target_path), draft_vocab_size=len(never), num_steps=2)
    monkeypatch.setattr(module, "_cut_vocab", lambda data: never)
    data = DataFlowDataModule(OnlineSource(prompts[0], target), global_batch_size=4, micro_batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, max_epochs=1, limit_train_batches=4, accumulate_grad_batches=2, **quiet
    )
    with pytest.raises(
        UserError, match="no token that the target predicts in the first 2 steps is in the draft vocabulary"
    ):
        trainer.fit(module, data)

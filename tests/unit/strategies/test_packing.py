"""Several samples in a row: the same sums, gradients and steps as one sample a row."""

import json

import lightning as L
import pytest
import torch

from lightning_dataflow.callbacks import ResultWriter
from lightning_dataflow.contracts import StepContext, UserError
from lightning_dataflow.data import DataFlowDataModule
from lightning_dataflow.producers import OnlineSource
from lightning_dataflow.strategies.blocks.blocks import Blocks
from lightning_dataflow.strategies.dflash.module import DFlashModule
from lightning_dataflow.strategies.domino.module import DominoModule
from lightning_dataflow.strategies.eagle3.module import Eagle3Module
from lightning_dataflow.strategies.eagle3.objective import TargetRows
from lightning_dataflow.strategies.module import DraftModule
from lightning_dataflow.targets import HFTargetEngine
from tests.streams import read_batches

BLOCKS = {"num_layers": 2, "block_size": 6, "num_anchors": 12}
KINDS = {
    "eagle3": (Eagle3Module, {"draft_vocab_size": 64, "num_steps": 4}),
    "eagle3-trained-embeddings": (Eagle3Module, {"draft_vocab_size": 64, "num_steps": 2, "train_embeddings": True}),
    "dflash": (DFlashModule, BLOCKS),
    "dflash-dpace": (DFlashModule, {**BLOCKS, "loss": "dpace"}),
    "dflash-sliding": (DFlashModule, {**BLOCKS, "layer_types": ["sliding_attention"] * 2, "sliding_window": 9}),
    "domino": (DominoModule, {**BLOCKS, "gru_hidden_dim": 8, "emb_dim": 8}),
}
SAMPLES, ROW_TOKENS = 6, 256
PACKED = {"row_tokens": ROW_TOKENS, "rows_per_step": 4, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def targets(target_path):
    layers = {"eagle3": (1, 3, 4), "dflash": (1, 2, 3, 4, 5), "domino": (1, 2, 3, 4, 5)}
    return {name: HFTargetEngine(target_path, layer_ids=ids, dtype="float32", device="cpu") for name, ids in layers.items()}


def make(kind, target_path, targets, prompts, **options):
    cls, sizes = KINDS[kind]
    module = cls(str(target_path), **{"lr": 1e-2, **sizes})
    source = OnlineSource(prompts[0], targets[module.strategy_name])
    return module, DataFlowDataModule(source, **{"global_batch_size": SAMPLES, **options})


def sums_and_gradients(module, data):
    """Of one window: the sums over its micro-batches."""
    torch.manual_seed(0)
    module.load_frozen_target(torch.device("cpu"))
    batches = read_batches(data, data.accumulate_grad_batches(1), module.collate)
    sums = [module.objective(batch, StepContext(global_step=0, total_steps=10)) for batch in batches]
    loss = sum(one.loss.numerator for one in sums)
    module.zero_grad()
    loss.backward()
    totals = {"loss": (loss.detach(), sum(one.loss.denominator for one in sums))}
    for name in sums[0].metrics:
        totals[name] = tuple(sum(getattr(one.metrics[name], part) for one in sums) for part in ("numerator", "denominator"))
    return batches, totals, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_gradients_are_those_of_one_sample_a_row(target_path, targets, prompts, kind):
    alone, sums, gradients = sums_and_gradients(*make(kind, target_path, targets, prompts))
    packed, packed_sums, packed_gradients = sums_and_gradients(*make(kind, target_path, targets, prompts, **PACKED))
    assert sorted(name.split(":")[1] for batch in packed for name in batch["sample_ids"] if name != "skipped") == sorted(
        name.split(":")[1] for batch in alone for name in batch["sample_ids"]
    )
    assert packed[0]["input_ids"].shape == (2, ROW_TOKENS)
    assert int((packed[0]["position"][0] == 0).sum()) > 2  # samples, and the padding
    for name, pair in sums.items():
        for one, other in zip(pair, packed_sums[name], strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5), name
    assert gradients.keys() == packed_gradients.keys()
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_a_packed_sample_sees_nothing_of_its_neighbours(target_path, targets, prompts):
    """The sums above could hide an exchange between samples: here one sample's features are spoilt."""
    for kind in ("eagle3", "dflash", "domino"):
        module, data = make(kind, target_path, targets, prompts, row_tokens=1024, rows_per_step=1)
        (batch,), *_ = sums_and_gradients(module, data)
        ends = [*(batch["position"][0] == 0).nonzero().squeeze(-1).tolist(), 1024]
        middle = slice(ends[2], ends[3])
        aux = batch["aux_hidden_states"].clone().requires_grad_()
        # No block, or no supervised position, of this sample is left; nothing else may depend on its features.
        if kind == "eagle3":
            rows = batch["target_rows"]
            keep = (rows[0] < middle.start) | (rows[0] >= middle.stop)
            changed = {**batch, "target_rows": TargetRows(*(part[keep] for part in rows))}
        else:
            blocks = batch["blocks"]
            keep = (blocks.anchor < middle.start) | (blocks.anchor >= middle.stop)
            changed = {**batch, "blocks": Blocks(*(part[keep] for part in blocks)), "label_rows": None}
        loss = module.objective({**changed, "aux_hidden_states": aux}, StepContext(global_step=0, total_steps=10)).loss
        (gradient,) = torch.autograd.grad(loss.numerator, aux)
        assert gradient[:, middle].abs().max() == 0, kind
        assert gradient[:, : middle.start].abs().max() > 0, kind
        assert gradient[:, middle.stop :].abs().max() > 0, kind


def fit(module, data, folder, max_steps=4, callbacks=(), **options):
    accumulation = data.accumulate_grad_batches(1)
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, max_steps=max_steps, max_epochs=1, logger=False,
        limit_train_batches=max_steps * accumulation, accumulate_grad_batches=accumulation,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ResultWriter(str(folder)), *callbacks],
    )  # fmt: skip
    trainer.fit(module, data, **options)
    return trainer


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "domino"])
def test_training_steps_are_those_of_one_sample_a_row(target_path, targets, prompts, tmp_path, kind):
    runs = []
    for options in ({}, PACKED, {**PACKED, "micro_batch_size": 1}):
        module, data = make(kind, target_path, targets, prompts, **options)
        fit(module, data, tmp_path)
        runs.append([float(loss) for loss in module.step_losses])
        assert data.next_seq == 4 * SAMPLES  # every window had room for all
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert runs[2] == pytest.approx(runs[0], rel=1e-5)
    assert len(set(runs[0])) == 4


@pytest.mark.integration
def test_resume_at_a_cursor_that_the_lengths_decide(target_path, targets, prompts, tmp_path):
    options = {"row_tokens": 160, "rows_per_step": 2, "global_batch_size": 32}
    module, data = make("eagle3", target_path, targets, prompts, **options)
    trainer = fit(module, data, tmp_path / "whole", max_steps=4)
    assert trainer.global_step == 4
    assert data.next_seq < 4 * 32
    whole = [float(loss) for loss in module.step_losses]
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert (result["samples_trained"], result["row_tokens"], result["rows_per_step"]) == (data.next_seq, 160, 2)
    order, lengths = data.source.order, [len(prompt.input_ids) for prompt in prompts[0]]
    num_tokens = sum(lengths[order.locate(seq)[0]] for seq in range(data.next_seq))
    assert result["throughput"]["padding_fraction"] == pytest.approx(1 - num_tokens / (4 * 2 * 160))

    first, half = make("eagle3", target_path, targets, prompts, **options)
    fit(first, half, tmp_path / "half", callbacks=[StopAfter(2, tmp_path)])
    assert 0 < half.next_seq < data.next_seq
    again, rest = make("eagle3", target_path, targets, prompts, **options)
    fit(again, rest, tmp_path / "rest", max_steps=4, ckpt_path=tmp_path / "step.ckpt")
    assert [float(loss) for loss in again.step_losses] == whole
    assert rest.next_seq == data.next_seq

    other, data = make("eagle3", target_path, targets, prompts, **{**options, "row_tokens": 128})
    with pytest.raises(UserError, match="written with row_tokens=160, this run has 128: resume with the same"):
        fit(other, data, tmp_path, ckpt_path=tmp_path / "step.ckpt")


class StopAfter(L.Callback):
    def __init__(self, steps, folder):
        self.steps, self.path = steps, folder / "step.ckpt"

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.steps and not trainer.should_stop:
            trainer.should_stop = True

    def on_train_end(self, trainer, *_):
        trainer.save_checkpoint(self.path)


def test_a_row_shorter_than_the_longest_sample(target_path, targets, prompts, tmp_path):
    longest = max(len(prompt.input_ids) for prompt in prompts[0])
    module, data = make("eagle3", target_path, targets, prompts, row_tokens=longest - 1, rows_per_step=4)
    with pytest.raises(
        UserError, match=f"row_tokens={longest - 1} is less than the {longest} tokens of the longest sample"
    ):
        fit(module, data, tmp_path)


def test_a_strategy_that_does_not_pack_refuses(target_path, targets, prompts, tmp_path):
    class Plain(Eagle3Module):
        packs = False

    module = Plain(str(target_path), draft_vocab_size=64)
    assert not DraftModule.packs
    data = DataFlowDataModule(OnlineSource(prompts[0], targets["eagle3"]), global_batch_size=SAMPLES, **PACKED)
    with pytest.raises(UserError, match="eagle3 does not pack samples: leave row_tokens and rows_per_step out"):
        fit(module, data, tmp_path)

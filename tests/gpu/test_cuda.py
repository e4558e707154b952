"""On a CUDA device: the same numbers as on the CPU, and the trainer configurations that need one."""

import copy

import pytest
import torch

from lightning_dataflow.data.prefetch import Prefetcher
from lightning_dataflow.strategies.blocks.attention import ContextKeys, block_attention
from lightning_dataflow.strategies.blocks.blocks import Blocks, cut_blocks
from lightning_dataflow.strategies.eagle3.attention import unrolled_attention
from lightning_dataflow.strategies.eagle3.network import Eagle3Config, Eagle3Draft
from lightning_dataflow.strategies.eagle3.objective import Eagle3Objective, supervised_positions
from tests.processes import TINY, TRAIN, python, result

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_steps", [1, 4])
def test_flex_attention_is_the_merged_attention(num_steps):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 6 if i == 0 else 2, 256, 64, requires_grad=True) for i in range(1 + 2 * num_steps)]
    on_gpu = [x.detach().cuda().requires_grad_() for x in inputs]
    outputs = [unrolled_attention(x[0], x[1 : 1 + num_steps], x[1 + num_steps :]) for x in (inputs, on_gpu)]
    assert torch.allclose(outputs[0], outputs[1].cpu(), atol=5e-3)
    weights = torch.randn_like(outputs[0])
    expected = torch.autograd.grad((outputs[0] * weights).sum(), inputs)
    found = torch.autograd.grad((outputs[1] * weights.cuda()).sum(), on_gpu)
    for one, other in zip(expected, found, strict=True):
        assert (one - other.cpu()).abs().max() < 1e-2 * one.abs().max()


@pytest.mark.parametrize("window", [None, 40])
def test_flex_block_attention_is_the_chunked_attention(window):
    torch.manual_seed(0)
    anchors = [torch.randperm(255)[:count].sort().values for count in (20, 7)]
    blocks = cut_blocks(torch.zeros(2, 256, dtype=torch.int64), torch.ones(2, 256), anchors, 16)
    shapes = [(27, 6, 16, 64)] + [(2, 2, 256, 64)] * 2 + [(27, 2, 16, 64)] * 2
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    on_gpu = [x.detach().cuda().requires_grad_() for x in inputs]
    there = Blocks(*(x.cuda() for x in blocks))
    outputs = [
        block_attention(x[0], ContextKeys(*x[1:]), place, window) for x, place in ((inputs, blocks), (on_gpu, there))
    ]
    assert torch.allclose(outputs[0], outputs[1].cpu(), atol=5e-3)
    weights = torch.randn_like(outputs[0])
    expected = torch.autograd.grad((outputs[0] * weights).sum(), inputs)
    found = torch.autograd.grad((outputs[1] * weights.cuda()).sum(), on_gpu)
    for one, other in zip(expected, found, strict=True):
        assert (one - other.cpu()).abs().max() < 1e-2 * one.abs().max()


@pytest.mark.parametrize("strategy", ["dflash", "domino"])
def test_block_drafts_give_the_cpus_losses(tmp_path, strategy):
    settings = (f"strategy={strategy}", "trainer.precision=32-true")
    for trainer in ("cpu", "gpu"):
        python(TRAIN, *TINY, *settings, f"trainer={trainer}", f"run_name={trainer}", cwd=tmp_path, timeout_s=280)
    assert result(tmp_path, "gpu")["losses"] == pytest.approx(result(tmp_path, "cpu")["losses"], rel=1e-2)


def test_a_training_step_is_the_cpus():
    torch.manual_seed(0)
    config = Eagle3Config(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=500,
        draft_vocab_size=200,
    )
    draft, length = Eagle3Draft(config), 256
    ids, mask = torch.randint(500, (2, length)), (torch.rand(2, length) > 0.3).float()
    tensors = [torch.randn(2, length, 384), torch.randn(500, 128), torch.randn(2, length, 128), torch.randn(500, 128)]

    def gradients(draft: Eagle3Draft, device: str) -> dict[str, torch.Tensor]:
        aux, embedding, last, head = (x.to(device) for x in tensors)
        sums = draft(
            ids.to(device),
            aux,
            embedding,
            4,
            lambda hidden, lm_head: Eagle3Objective()(
                hidden,
                lm_head,
                last_hidden_state=last,
                target_head=head,
                target_ids=draft.target_ids,
                t2d=draft.t2d,
                rows=supervised_positions(mask.to(device)),
            ),
        )
        (sums.loss.numerator / sums.loss.denominator).backward()
        return {name: parameter.grad.cpu() for name, parameter in draft.named_parameters()}

    on_gpu = gradients(copy.deepcopy(draft).cuda(), "cuda")
    for name, expected in gradients(draft, "cpu").items():
        assert (on_gpu[name] - expected).abs().max() < 2e-2 * expected.abs().max(), name


@pytest.mark.parametrize("trainer", ["gpu", "ddp", "fsdp2", "fsdp"])
def test_trainers_give_the_cpus_losses(tmp_path, trainer):
    python(TRAIN, *TINY, "run_name=cpu", cwd=tmp_path)
    options = (f"trainer={trainer}", "trainer.devices=1", "trainer.precision=32-true", f"run_name={trainer}")
    python(TRAIN, *TINY, *options, cwd=tmp_path, timeout_s=280)
    assert result(tmp_path, trainer)["losses"] == pytest.approx(result(tmp_path, "cpu")["losses"], rel=1e-2)


def test_batches_are_copied_to_the_device_ahead():
    batches = [
        {"x": torch.full((1024, 1024), float(index)), "rows": (torch.full((8,), index),), "next_seq": index}
        for index in range(8)
    ]
    prefetcher = Prefetcher(iter(batches), depth=2, device=torch.device("cuda", 0))
    for index, batch in enumerate(prefetcher):
        assert batch["x"].is_cuda
        assert batch["rows"][0].is_cuda
        assert batch["next_seq"] == index
        assert batch["x"].eq(index).all()
    prefetcher.close()

"""DFlash and Domino in a real Trainer: anchors, batches, gradients of the global quotient, what is refused."""

from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_dataflow.contracts import StepContext, UserError
from lightning_dataflow.data import DataFlowDataModule, OfflineSource, Sample, SampleRows
from lightning_dataflow.producers import OnlineSource, capture_to_folder
from lightning_dataflow.strategies.blocks.anchors import draw_anchors
from lightning_dataflow.strategies.blocks.mask_token import choose_mask_token
from lightning_dataflow.strategies.checkpoint import load_module
from lightning_dataflow.strategies.dflash.module import DFlashModule
from lightning_dataflow.strategies.dflash.objective import DFlashObjective
from lightning_dataflow.strategies.domino.module import DominoModule
from lightning_dataflow.strategies.domino.objective import DominoObjective
from lightning_dataflow.strategies.registry import resolve_strategy
from lightning_dataflow.targets import HFTargetEngine
from tests.prompts import data_set
from tests.streams import read_batches

GLOBAL_BATCH, NUM_STEPS = 4, 2
SMALL = {"num_layers": 1, "block_size": 6, "num_anchors": 12, "lr": 1e-2}
KINDS = {
    "decay": (DFlashModule, {}),
    "dpace": (DFlashModule, {"loss": "dpace"}),
    "sliding": (DFlashModule, {"layer_types": ["sliding_attention"], "sliding_window": 9}),
    "domino": (DominoModule, {"gru_hidden_dim": 8, "emb_dim": 8}),
    "shifted": (DominoModule, {"gru_hidden_dim": 8, "emb_dim": 8, "shift_label": True, "pure_draft_prefix_len": 1}),
}


@pytest.fixture(scope="module")
def block_target(target_path: Path) -> HFTargetEngine:
    return HFTargetEngine(target_path, layer_ids=(1, 2, 3, 4, 5), dtype="float32", device="cpu")


def make_module(target_path, kind="decay", sgd=False, **options):
    cls, more = KINDS[kind]
    if sgd:
        cls = type("SGD", (SGD, cls), {})
    return cls(str(target_path), **{**SMALL, **more, **options})


class SGD:
    """Plain SGD shows a gradient of the wrong scale. Keeps the last gradients and λ."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}

    def objective(self, batch, context):
        sums = super().objective(batch, context)
        if "base_share" in sums.metrics:
            one = sums.metrics["base_share"]
            self.shares = [*getattr(self, "shares", []), (one.numerator / one.denominator).item()]
        return sums


def make_data(prompts, target, **options):
    source = OnlineSource(prompts, target)
    return DataFlowDataModule(source, **{"global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2} | options)


def fit(module, data, folder, max_steps=NUM_STEPS, **options):
    accumulation = data.accumulate_grad_batches(1)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=1,
        limit_train_batches=max_steps * accumulation,
        accumulate_grad_batches=accumulation,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data)
    return trainer


def sample(mask, source_id="00000001", pass_index=0, sample_id="x"):
    tensors = {"loss_mask": torch.tensor(mask)}
    return Sample(sample_id=sample_id, source_id=source_id, pass_index=pass_index, num_tokens=len(mask), tensors=tensors)


def test_anchors_are_drawn_among_positions_with_two_supervised_tokens():
    mask = [0, 1, 1, 1, 0, 1, 0, 1, 1]
    assert draw_anchors(sample(mask), 256, seed=0).tolist() == [1, 2, 7]
    assert draw_anchors(sample([1, 0, 1, 0, 0]), 256, seed=0).tolist() == []
    seen = {position for number in range(60) for position in draw_anchors(sample(mask, str(number)), 2, seed=0).tolist()}
    assert seen == {1, 2, 7}
    for number in range(20):
        drawn = draw_anchors(sample([1] * 50, str(number)), 8, seed=0).tolist()
        assert len(set(drawn)) == 8
        assert drawn == sorted(drawn)


def test_anchors_depend_on_seed_prompt_and_pass_alone():
    first = draw_anchors(sample([1] * 100), 8, seed=0).tolist()
    torch.rand(3)
    assert draw_anchors(sample([1] * 100, sample_id="other run"), 8, seed=0).tolist() == first
    for other in (
        draw_anchors(sample([1] * 100), 8, seed=1),
        draw_anchors(sample([1] * 100, "2"), 8, seed=0),
        draw_anchors(sample([1] * 100, pass_index=1), 8, seed=0),
    ):
        assert other.tolist() != first


def blocks_by_sample(module, data, num_batches, rank_of=lambda sample: 0):
    """Anchors of every sample of the first micro-batches, in order."""
    found = []
    for batch in read_batches(data, num_batches, module.collate):
        for row, length in enumerate(batch["sample_ids"]):
            found.append(batch["blocks"].anchor[batch["blocks"].row == row].tolist())
            assert length
    return found


def test_anchors_are_those_of_any_batch_and_topology_and_new_in_every_pass(target_path, prompts, block_target, tmp_path):
    few, module = data_set(prompts[0][:8]), make_module(target_path)
    capture_to_folder(few, block_target, tmp_path)
    runs = [blocks_by_sample(module, make_data(few, block_target, micro_batch_size=size), 16 // size) for size in (1, 2, 4)]
    offline = DataFlowDataModule(OfflineSource(tmp_path), global_batch_size=GLOBAL_BATCH, micro_batch_size=2)
    runs.append(blocks_by_sample(module, offline, 8))
    assert runs[0] == runs[1] == runs[2] == runs[3]
    data = DataFlowDataModule(OfflineSource(tmp_path), global_batch_size=GLOBAL_BATCH)  # the same order of prompts
    assert blocks_by_sample(make_module(target_path, seed=1), data, 4) != runs[0][:4]
    order = [make_data(few, block_target).source.order.locate(seq) for seq in range(16)]
    passes = [dict(sorted((index, runs[0][seq]) for seq, (index, one) in enumerate(order) if one == p)) for p in (0, 1)]
    assert all(passes[0][index] != passes[1][index] for index in range(8))


def test_a_batch_by_hand(target_path):
    module = make_module(target_path, block_size=3)
    features = {"aux_hidden_states": torch.ones(5, 320), "last_hidden_state": torch.ones(5, 64)}
    ids, mask = torch.tensor([7, 8, 9, 10, 11]), torch.tensor([0, 0, 1, 1, 0], dtype=torch.uint8)
    one = Sample(
        sample_id="x", source_id="x", pass_index=0, num_tokens=5,
        tensors={"input_ids": ids, "loss_mask": mask, **features},
    )  # fmt: skip
    batch = module.collate(SampleRows([[one]]))
    assert "last_hidden_state" not in batch
    assert batch["blocks"].anchor.tolist() == [2]
    assert batch["blocks"].tokens.tolist() == [[9, 10, 11, 0]]
    assert batch["blocks"].supervised.tolist() == [[True, True, False, False]]
    assert batch["label_rows"].tolist() == [1]


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("decay", DFlashObjective(gamma=3.0)),
        ("dpace", DFlashObjective(dpace=True, dpace_alpha=0.2)),
        ("domino", DominoObjective(gamma=3.0, lambda_start=0.8, lambda_decay_ratio=0.25)),
        ("shifted", DominoObjective(gamma=3.0, lambda_start=0.8, lambda_decay_ratio=0.25, first_offset=0)),
    ],
)
def test_a_module_has_the_objective_that_its_arguments_name(target_path, prompts, block_target, kind, objective):
    lambdas = {"lambda_start": 0.8, "lambda_decay_ratio": 0.25} if isinstance(objective, DominoObjective) else {}
    alpha = {"dpace_alpha": 0.2} if kind == "dpace" else {}
    module, data = make_module(target_path, kind, gamma=3.0, **lambdas, **alpha), make_data(prompts[0], block_target)
    if kind in ("domino", "shifted"):  # a new draft corrects nothing
        torch.nn.init.normal_(module.draft.correction_weight)
    module.load_frozen_target(torch.device("cpu"))
    (batch,), now = read_batches(data, 1, module.collate), StepContext(global_step=1, total_steps=8)
    blocks, target = batch["blocks"], module.frozen_target
    scored = module.draft(batch["aux_hidden_states"], target.embedding, blocks, lambda *scored: scored)
    expected, found = objective(*scored, target.head, blocks, now), module.objective(batch, now)
    assert torch.allclose(found.loss.numerator, expected.loss.numerator)
    assert torch.equal(found.loss.denominator, expected.loss.denominator)
    if lambdas:  # λ = 0.8 · (1 − 1/2)
        share = found.metrics["base_share"]
        assert (share.numerator / share.denominator).item() == pytest.approx(0.4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.integration
def test_gradients_and_a_clipped_sgd_step_do_not_depend_on_the_micro_batch(
    target_path, prompts, block_target, tmp_path, kind
):
    modules = []
    for micro_batch_size in (1, 4):
        data = make_data(prompts[0], block_target, micro_batch_size=micro_batch_size)
        module = make_module(target_path, kind, sgd=True)
        fit(module, data, tmp_path, max_steps=4, gradient_clip_val=0.05)
        modules.append(module)
    first, other = modules
    assert first.gradients.keys() == other.gradients.keys() == {name for name, _ in first.named_parameters()}
    for name, gradient in first.gradients.items():
        assert (gradient - other.gradients[name]).abs().max() < 2e-5 * gradient.abs().max() + 1e-9, name
    for (name, one), two in zip(first.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-7), name
    assert first.step_losses == pytest.approx(other.step_losses, rel=1e-5)
    if kind == "domino":  # one λ for all micro-batches of a step, 0 from half way on
        assert first.shares == pytest.approx([1.0] * 4 + [0.5] * 4 + [0.0] * 8 + [0.0])  # the last to try the weights


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["decay", "domino"])
def test_training_lowers_the_loss_and_a_checkpoint_holds_the_draft_alone(
    target_path, prompts, block_target, tmp_path, kind
):
    module = make_module(target_path, kind)
    trainer = fit(module, make_data(prompts[0], block_target), tmp_path, max_steps=16)
    losses = [float(loss) for loss in module.step_losses]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    trainer.save_checkpoint(tmp_path / "draft.ckpt")
    checkpoint = torch.load(tmp_path / "draft.ckpt", weights_only=True)
    assert not any("embed_tokens" in name or "lm_head" in name for name in checkpoint["state_dict"])
    checkpoint["hyper_parameters"]["_instantiator"] = "lightning.pytorch.cli.instantiate_module"  # as LightningCLI saves it
    torch.save(checkpoint, tmp_path / "draft.ckpt")
    loaded = load_module(tmp_path / "draft.ckpt")
    assert loaded.mask_token_id == module.mask_token_id
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def every_other_token(prompts, count):
    """Prompts whose supervised tokens are never neighbours."""
    from dataclasses import replace

    some = [replace(one, loss_mask=tuple(i % 2 for i in range(len(one.input_ids)))) for one in prompts[0][:count]]
    return data_set(some)


def test_a_sample_without_neighbouring_supervised_tokens_weighs_nothing(target_path, prompts, block_target, tmp_path):
    few = every_other_token(prompts, 1)
    mixed = data_set([*few[:1], *prompts[0][1:4]])
    module = make_module(target_path)
    anchors = blocks_by_sample(module, make_data(mixed, block_target), 2)
    assert sorted(len(one) for one in anchors)[:2] == [0, 12]
    module = make_module(target_path, "dpace")
    data = make_data(mixed, block_target, micro_batch_size=4)
    module.load_frozen_target(torch.device("cpu"))
    sums = module.objective(*read_batches(data, 1, module.collate), None)
    assert sums.loss.denominator == 3


@pytest.mark.parametrize("kind", ["decay", "dpace", "domino"])
def test_data_without_any_block(target_path, prompts, block_target, tmp_path, kind):
    data = make_data(every_other_token(prompts, 8), block_target)
    with pytest.raises(UserError, match="no sample of 2 steps has two supervised tokens in a row"):
        fit(make_module(target_path, kind), data, tmp_path, max_steps=5)


def test_the_mask_token(target_path, prompts, block_target, tmp_path):
    assert make_module(target_path).mask_token_id == 259  # the first row beyond the tokenizer's 259 ids
    counts = OnlineSource(prompts[0], block_target).token_counts(320)
    common = int(counts.argmax())
    with pytest.raises(UserError, match=f"mask_token_id={common} occurs .* set strategy.mask_token_id"):
        fit(make_module(target_path, mask_token_id=common), make_data(prompts[0], block_target), tmp_path)
    module = make_module(target_path)
    module.load_frozen_target(torch.device("cpu"))
    module.frozen_target.embedding = module.frozen_target.embedding.clone().index_fill_(0, torch.tensor([259]), 0)
    with pytest.raises(UserError, match="embedding of zeros"):
        fit(module, make_data(prompts[0], block_target), tmp_path)


class FakeTokenizer:
    """Ids 0..9; what a tokenizer says of its special tokens."""

    mask_token_id = bos_token_id = unk_token_id = None
    eos_token_id, pad_token_id = 9, 8
    chat_template = "<user>{{ text }}"

    def __init__(self, **special):
        token = type("Token", (), {"special": True, "__str__": lambda self: self.text})
        self.added_tokens_decoder = {}
        for name, id in special.items():
            self.added_tokens_decoder[id] = token()
            self.added_tokens_decoder[id].text = f"<{name}>"

    def get_vocab(self):
        return {str(id): id for id in range(10)}


def test_how_a_mask_token_is_chosen(tokenizer):
    assert choose_mask_token(tokenizer, 320) == 259
    assert choose_mask_token(FakeTokenizer(), 16) == 10
    assert choose_mask_token(FakeTokenizer(user=5, file=6, name=7, eos=9, pad=8), 10) == 7
    assert choose_mask_token(FakeTokenizer(reserved_0=5, reserved_1=6, name=7), 10) == 5
    with pytest.raises(UserError, match="set mask_token_id"):
        choose_mask_token(FakeTokenizer(user=5, eos=9, pad=8), 10)
    fake = FakeTokenizer(name=7)
    fake.mask_token_id = 3
    assert choose_mask_token(fake, 16) == 3


@pytest.mark.parametrize(
    ("num_layers", "ids"),
    [(36, (1, 9, 17, 25, 33)), (30, (1, 8, 14, 20, 27)), (8, (1, 2, 3, 4, 5)), (6, (1, 2, 3)), (4, (2,)), (1, (0,))],
)
def test_default_layers(num_layers, ids):
    for name in ("dflash", "domino"):
        assert resolve_strategy(name).default_layer_ids(num_layers) == ids


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("decay", {"num_anchors": 0}, "choose 1 to 512"),
        ("decay", {"num_anchors": 513}, "choose 1 to 512"),
        ("decay", {"loss": "mean"}, "use decay or dpace"),
        ("decay", {"mask_token_id": 320}, "choose 0 to 319"),
        ("domino", {"layer_ids": [9]}, "ids go from 0 to 7"),
        ("domino", {"pure_draft_prefix_len": 9}, "choose 0 to 4"),
    ],
)
def test_bad_arguments(target_path, kind, options, message):
    with pytest.raises(UserError, match=message):
        make_module(target_path, kind, **options)

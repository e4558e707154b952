"""Real decoding with block drafts gives the target's own output, whatever the draft is worth."""

import pytest
import torch

from lightning_dataflow.contracts import StepContext, UserError
from lightning_dataflow.evaluation.acceptance import Decoding, evaluate_acceptance
from lightning_dataflow.evaluation.loop import SpeculativeDecoder
from lightning_dataflow.strategies.blocks.blocks import cut_blocks
from lightning_dataflow.strategies.blocks.drafter import BlockDrafter
from lightning_dataflow.strategies.blocks.network import BlockConfig, BlockDraft
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.strategies.dflash.objective import DFlashObjective
from lightning_dataflow.strategies.domino.drafter import DominoDrafter
from lightning_dataflow.strategies.domino.network import DominoConfig, DominoDraft
from lightning_dataflow.strategies.domino.objective import DominoObjective
from lightning_dataflow.targets.hf import TargetSession
from tests.decoding import greedy_decode, second_token_chi_square

KINDS = ["dflash", "sliding", "domino", "shifted"]


@pytest.fixture(scope="module")
def questions(prompts):
    return [list(prompt.question) for prompt in prompts[0][:4]]


def make_drafter(target, target_path, kind, num_draft_tokens=4):
    torch.manual_seed(0)
    info = target.info
    sizes = {
        "hidden_size": info.hidden_size,
        "intermediate_size": info.intermediate_size,
        "num_layers": 2,
        "num_attention_heads": info.num_attention_heads,
        "num_key_value_heads": info.num_key_value_heads,
        "head_dim": info.head_dim,
        "vocab_size": info.vocab_size,
        "mask_token_id": 300,
        "num_aux_layers": 3,
        "block_size": 6,
    }
    frozen = FrozenTarget.of(info, torch.float32)
    if kind in ("domino", "shifted"):
        draft = DominoDraft(DominoConfig(**sizes, gru_hidden_dim=8, emb_dim=8, shift_label=kind == "shifted"))
        torch.nn.init.normal_(draft.correction_weight)
        return DominoDrafter(draft, frozen, num_draft_tokens=num_draft_tokens)
    more = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 7} if kind == "sliding" else {}
    return BlockDrafter(BlockDraft(BlockConfig(**sizes, **more)), frozen, num_draft_tokens=num_draft_tokens)


def train_on(drafter, target, sequence, num_steps=60):
    """Learn one sequence nearly by heart."""
    ids = torch.tensor([sequence])
    aux = TargetSession(target).extend(sequence)[1].unsqueeze(0)
    blocks = cut_blocks(ids, torch.ones_like(ids), [torch.arange(0, len(sequence) - 1, 2)], 6)
    draft, head, embedding = drafter.draft, drafter.target.head, drafter.target.embedding
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    for _ in range(num_steps):
        if isinstance(draft, DominoDraft):
            objective, now = (
                DominoObjective(first_offset=draft.config.first_offset),
                StepContext(global_step=1, total_steps=4),
            )
            sums = draft(aux, embedding, blocks, lambda *scored: objective(*scored, head, blocks, now))  # noqa: B023
        else:
            sums = draft(aux, embedding, blocks, lambda hidden: DFlashObjective()(hidden, head, blocks))
        optimizer.zero_grad()
        (sums.loss.numerator / sums.loss.denominator).backward()
        optimizer.step()


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_the_targets_own(target, target_path, questions, kind):
    drafter = make_drafter(target, target_path, kind)
    report = evaluate_acceptance(target, drafter, questions, Decoding(max_new_tokens=24), baseline=True)
    assert report.num_identical == len(questions)
    own = greedy_decode(target, questions[0], 24)
    train_on(drafter, target, [*questions[0], *own])
    report = evaluate_acceptance(target, drafter, questions, Decoding(max_new_tokens=24), baseline=True)
    assert report.num_identical == len(questions)
    assert report.acceptance_length > 1.2


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_sampled_decoding_follows_the_target(target, target_path, questions, kind):
    """The first drafted position of many runs against the target's exact distribution of the second token."""
    question = questions[0]
    drafter = make_drafter(target, target_path, kind, num_draft_tokens=2)
    train_on(drafter, target, [*question, *greedy_decode(target, question, 8)], num_steps=15)
    decoder = SpeculativeDecoder(target, drafter, temperature=1.5)
    chi_square = second_token_chi_square(target, decoder, question, num_trials=500, num_tokens=8)
    assert chi_square < 26.1  # 8 degrees of freedom, 0.1 %


@pytest.mark.parametrize("kind", KINDS)
def test_the_drafter_keeps_verified_positions_only(target, target_path, questions, kind):
    """After any round its proposal is that of a fresh drafter that observed the whole verified sequence."""
    ids = [*questions[0], *greedy_decode(target, questions[0], 12)]
    aux = TargetSession(target).extend(ids)[1]
    drafter, generator, start = make_drafter(target, target_path, kind), torch.Generator(), len(questions[0])
    drafter.observe(ids[1 : start + 1], aux[:start])
    for stop in (start + 1, start + 4, start + 6, start + 10):  # 1, 3, 2 and 4 tokens verified
        drafter.propose(0, generator)
        drafter.observe(ids[start + 1 : stop + 1], aux[start:stop])
        start = stop
        fresh = make_drafter(target, target_path, kind)
        fresh.observe(ids[1 : stop + 1], aux[:stop])
        assert drafter.propose(0, generator).tokens == fresh.propose(0, generator).tokens


@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_a_sampled_proposal_carries_what_it_was_drawn_from(target, target_path, questions, kind):
    drafter = make_drafter(target, target_path, kind)
    aux = TargetSession(target).extend(questions[0])[1]
    drafter.observe([*questions[0][1:], 5], aux)
    proposal = drafter.propose(1.0, torch.Generator().manual_seed(0))
    assert proposal.probabilities.shape == (4, 320)
    assert torch.allclose(proposal.probabilities.sum(-1), torch.ones(4))
    assert len(proposal.tokens) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_proposal_is_drawn_from_what_training_scores(target, target_path, questions, kind):
    """A training pass over prompt and proposal has its distributions: each token is corrected by all before it."""
    first = 0 if kind == "shifted" else 1
    drafter, ids = make_drafter(target, target_path, kind, num_draft_tokens=6 - first), questions[0]
    aux = TargetSession(target).extend(ids)[1]
    drafter.observe([*ids[1:], 5], aux)
    proposal = drafter.propose(1.0, torch.Generator().manual_seed(0))
    sequence = torch.tensor([[*ids, 5, *proposal.tokens]])
    blocks = cut_blocks(sequence, torch.ones_like(sequence), [torch.tensor([len(ids)])], 6)
    hidden, *correction = drafter.draft(aux.unsqueeze(0), drafter.target.embedding, blocks, lambda *scored: scored)
    logits = hidden[0] @ drafter.target.head.T
    if correction:
        features, weight = correction
        logits = logits + features[0] @ weight.T
    assert torch.allclose(proposal.probabilities, torch.softmax(logits[first:], -1), atol=1e-6)
    assert proposal.probabilities.max() > 2 / 320


@pytest.mark.parametrize(("kind", "longest"), [("dflash", 5), ("domino", 5), ("shifted", 6)])
def test_how_long_a_proposal_can_be(target, target_path, kind, longest):
    assert make_drafter(target, target_path, kind, longest).num_draft_tokens == longest
    for wrong in (0, longest + 1):
        with pytest.raises(UserError, match=f"blocks of 6 draft at most {longest} tokens"):
            make_drafter(target, target_path, kind, wrong)

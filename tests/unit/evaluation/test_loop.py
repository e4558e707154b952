import pytest
import torch

from lightning_dataflow.contracts import NotFiniteError
from lightning_dataflow.evaluation.acceptance import Decoding, evaluate_acceptance
from lightning_dataflow.evaluation.loop import Drafter, Proposal, SpeculativeDecoder, rejection_sample
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.strategies.eagle3.draft_vocab import most_frequent
from lightning_dataflow.strategies.eagle3.drafter import ChainDrafter
from lightning_dataflow.strategies.eagle3.network import Eagle3Config, Eagle3Draft
from lightning_dataflow.targets import HFTargetEngine
from lightning_dataflow.targets.hf import TargetSession
from tests.decoding import greedy_decode, second_token_chi_square


@pytest.fixture(scope="module")
def questions(prompts):
    return [list(prompt.question) for prompt in prompts[0][:6]]


def make_drafter(target, target_path, draft_vocab_size=64, num_draft_tokens=3):
    torch.manual_seed(0)
    info = target.info
    config = Eagle3Config(
        hidden_size=info.hidden_size,
        intermediate_size=info.intermediate_size,
        num_attention_heads=info.num_attention_heads,
        num_key_value_heads=info.num_key_value_heads,
        head_dim=info.head_dim,
        vocab_size=info.vocab_size,
        draft_vocab_size=draft_vocab_size,
    )
    draft = Eagle3Draft(config)
    draft.set_target_ids(most_frequent(torch.arange(info.vocab_size), draft_vocab_size))
    return ChainDrafter(draft, FrozenTarget.of(info, torch.float32).embedding, num_draft_tokens=num_draft_tokens)


class Oracle(Drafter):
    """Proposes the target's own greedy continuation, wrong from `wrong_at` on."""

    def __init__(self, target, question, num_draft_tokens=3, wrong_at=99):
        self.continuation = greedy_decode(target, question, 64)
        self.num_draft_tokens, self.wrong_at = num_draft_tokens, wrong_at
        self.start = -len(question) + 1

    def reset(self):
        self.position = self.start

    def observe(self, next_tokens, aux_hidden_states):
        assert len(next_tokens) == len(aux_hidden_states)
        self.position += len(next_tokens)

    def propose(self, temperature, generator):
        tokens = (self.continuation + [0] * 8)[self.position : self.position + self.num_draft_tokens]
        return Proposal([token if i < self.wrong_at else (token + 1) % 320 for i, token in enumerate(tokens)])


@pytest.mark.integration
def test_greedy_output_is_the_targets_own(target, target_path, questions):
    decoder = SpeculativeDecoder(target, make_drafter(target, target_path))
    for question in questions:
        assert decoder.generate(question, 24).tokens == greedy_decode(target, question, 24)


def test_greedy_decode_is_transformers_generate(target, questions):
    ids = torch.tensor([questions[0]])
    expected = target.model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert greedy_decode(target, questions[0], 16) == expected.tolist()


@pytest.mark.parametrize(("wrong_at", "length"), [(99, 4), (1, 2), (0, 1)])
def test_acceptance_counts(target, questions, wrong_at, length):
    oracle = Oracle(target, questions[0], wrong_at=wrong_at)
    if len(oracle.continuation) < 64:
        pytest.skip("the tiny target ends this answer early")
    report = evaluate_acceptance(target, oracle, [questions[0]], Decoding(max_new_tokens=25), baseline=True)
    assert report.acceptance_length == length
    assert report.acceptance_per_position == tuple(float(i < wrong_at) for i in range(3))
    assert report.num_drafts == 24 // length
    assert report.num_tokens == 25
    assert report.num_identical == 1
    assert report.tokens_per_target_forward == pytest.approx(25 / (24 // length + 1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_target_without_finite_logits_is_refused(target_path, questions, temperature, value):
    """Its argmax is the same token everywhere, so that any draft would agree with it."""
    broken = HFTargetEngine(target_path, layer_ids=(1, 3, 4), dtype="float32", device="cpu")
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[7] = value
    with pytest.raises(NotFiniteError, match="the target's logits hold NaN or infinity: check its weights"):
        evaluate_acceptance(
            broken, make_drafter(broken, target_path), questions, Decoding(max_new_tokens=8, temperature=temperature)
        )


def test_it_stops_at_an_end_token(target, target_path, questions, monkeypatch):
    plain = greedy_decode(target, questions[0], 20)
    monkeypatch.setattr(target, "eos_token_ids", (plain[7],))
    stop = plain.index(plain[7]) + 1
    assert greedy_decode(target, questions[0], 20) == plain[:stop]
    oracle = Oracle(target, questions[0])
    oracle.continuation = plain
    assert SpeculativeDecoder(target, oracle).generate(questions[0], 20).tokens == plain[:stop]


@pytest.mark.integration
def test_the_rejection_rule_keeps_the_targets_distribution():
    """Two drafted tokens over four symbols, against the exact joint distribution of the first two tokens."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7], [0.25, 0.25, 0.25, 0.25]])
    q = torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.4, 0.2, 0.3, 0.1]])
    counts, trials = torch.zeros(4, 4), 20_000
    for _ in range(trials):
        tokens = [int(torch.multinomial(row, 1, generator=generator)) for row in q]
        kept, after = rejection_sample(p, q, tokens, generator)
        output = [*tokens[:kept], after]
        if len(output) < 2:  # the next round would draw the second token from the target
            output.append(int(torch.multinomial(p[1], 1, generator=generator)))
        counts[output[0], output[1]] += 1
    expected = p[0][:, None] * p[1][None, :] * trials
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 37.7  # 15 degrees of freedom, 0.1 %


@pytest.mark.integration
def test_sampled_decoding_follows_the_target(target, target_path, questions):
    """The first drafted position of many runs against the target's exact distribution of the second token."""
    decoder = SpeculativeDecoder(target, make_drafter(target, target_path, num_draft_tokens=1), temperature=1.5)
    chi_square = second_token_chi_square(target, decoder, questions[0], num_trials=1000, num_tokens=12)
    assert chi_square < 32.9  # 12 degrees of freedom, 0.1 %


def test_the_drafter_keeps_verified_positions_only(target, target_path, questions):
    """After any round its proposal is that of a fresh drafter that observed the whole verified sequence."""
    ids = [*questions[0], *greedy_decode(target, questions[0], 12)]
    aux = TargetSession(target).extend(ids)[1]
    drafter = make_drafter(target, target_path)
    generator = torch.Generator()
    start = len(questions[0])
    drafter.observe(ids[1 : start + 1], aux[:start])
    for stop in (start + 1, start + 4, start + 6, start + 10):  # 1, 3, 2 and 4 tokens verified
        drafter.propose(0, generator)
        drafter.observe(ids[start + 1 : stop + 1], aux[start:stop])
        start = stop
        fresh = make_drafter(target, target_path)
        fresh.observe(ids[1 : stop + 1], aux[:stop])
        assert drafter.propose(0, generator).tokens == fresh.propose(0, generator).tokens
        assert drafter.cache.length == fresh.cache.length == stop


@pytest.mark.integration
def test_a_target_with_sliding_windows(tmp_path, tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    target = HFTargetEngine(tmp_path, layer_ids=[0, 2, 3], dtype="float32", device="cpu")
    question = list(range(5, 25))
    for wrong_at in (0, 2, 99):
        oracle = Oracle(target, question, wrong_at=wrong_at)
        assert SpeculativeDecoder(target, oracle).generate(question, 24).tokens == greedy_decode(target, question, 24)


def test_sampling_is_repeatable(target, target_path, questions):
    runs = [
        SpeculativeDecoder(target, make_drafter(target, target_path), temperature=1.0, seed=seed).generate(questions[1], 16)
        for seed in (3, 3, 4)
    ]
    assert runs[0].tokens == runs[1].tokens != runs[2].tokens

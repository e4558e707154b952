"""Several sequences at a time: the tokens, counts and draws of one at a time."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lightning_dataflow.contracts import UserError
from lightning_dataflow.evaluation.acceptance import Decoding, evaluate_acceptance
from lightning_dataflow.evaluation.loop import NoDrafter, SpeculativeDecoder
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.strategies.eagle3.drafter import ChainDrafter
from lightning_dataflow.strategies.eagle3.network import Eagle3Config, Eagle3Draft
from lightning_dataflow.targets import HFTargetEngine
from tests.decoding import greedy_decode
from tests.unit.evaluation.test_block import make_drafter as make_block_drafter, train_on
from tests.unit.evaluation.test_loop import make_drafter

SYMBOLS = 5


@pytest.fixture(scope="module")
def questions(prompts):
    return [list(prompt.question) for prompt in prompts[0][:6]] + [[5], [9, 3]]


@pytest.fixture(scope="module")
def drafters(target, target_path, questions):
    """An EAGLE3 draft that knows nothing, and a DFlash draft that gets some right."""
    block = make_block_drafter(target, target_path, "dflash")
    train_on(block, target, [*questions[0], *greedy_decode(target, questions[0], 24)])
    return {"eagle3": make_drafter(target, target_path), "dflash": block, "none": NoDrafter()}


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "none"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_its_sequences(target, questions, drafters, kind, temperature, monkeypatch):
    monkeypatch.setattr(target, "eos_token_ids", tuple(range(24)))
    decoder = SpeculativeDecoder(target, drafters[kind], temperature=temperature)

    def generators(count):
        return [torch.Generator().manual_seed(seed) for seed in range(count)]

    together = decoder.generate_batch(questions, 24, generators(len(questions)))
    alone = [
        decoder.generate_batch([question], 24, [generator])[0]
        for question, generator in zip(questions, generators(len(questions)), strict=True)
    ]
    assert together == alone
    assert len({len(one.tokens) for one in alone}) > 1, "some end before others"


@pytest.mark.integration
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_counts_depend_neither_on_the_batch_nor_on_the_order(target, questions, drafters, temperature):
    def counts(prompts, batch_size):
        report = evaluate_acceptance(
            target, drafters["dflash"], prompts, Decoding(max_new_tokens=16, temperature=temperature, batch_size=batch_size)
        )
        return report.num_tokens, report.num_drafts, report.accepted_per_position

    expected = counts(questions, 1)
    assert expected == counts(questions, 3) == counts(questions[::-1], len(questions))


@pytest.mark.integration
def test_the_target_alone(target, questions, drafters):
    report = evaluate_acceptance(
        target, drafters["dflash"], questions, Decoding(max_new_tokens=12, batch_size=4), baseline=True
    )
    assert report.num_identical == len(questions)
    assert report.plain_tokens == report.num_tokens
    assert report.speed_up == pytest.approx(report.plain_seconds / report.seconds)
    sampled = evaluate_acceptance(
        target, drafters["dflash"], questions, Decoding(max_new_tokens=12, temperature=1.0, batch_size=4), baseline=True
    )
    assert sampled.num_identical is None and sampled.speed_up > 0


@pytest.mark.integration
def test_what_a_proposal_got_accepted_counts_whole(target, questions, drafters):
    """Also where the output is cut: one token asked for takes no draft, a second one takes a whole one."""
    alone = evaluate_acceptance(target, drafters["dflash"], questions[:1], Decoding(max_new_tokens=1))
    assert (alone.num_tokens, alone.num_drafts) == (1, 0)
    assert alone.acceptance_length == 1
    cut = evaluate_acceptance(target, drafters["dflash"], questions[:1], Decoding(max_new_tokens=2))
    assert (cut.num_tokens, cut.num_drafts, cut.num_draft_tokens) == (2, 1, 4)
    assert cut.num_accepted_tokens > 1, "this draft knows the sequence by heart"


@pytest.mark.integration
@pytest.mark.parametrize("baseline", [False, True])
def test_a_rank_without_prompts_reports_zeros(target, drafters, baseline):
    report = evaluate_acceptance(target, drafters["dflash"], [], Decoding(max_new_tokens=2), baseline=baseline)
    assert (report.num_prompts, report.num_tokens, report.num_drafts) == (0, 0, 0)
    assert report.accepted_per_position == (0,) * 4


@pytest.mark.integration
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "evaluate.temperature=-1.0: use 0"),
        ({"temperature": float("nan")}, "evaluate.temperature=nan: use 0"),
    ],
)
def test_bad_settings(target, drafters, options, message):
    with pytest.raises(UserError, match=message):
        evaluate_acceptance(target, drafters["none"], [[1]], Decoding(**{"max_new_tokens": 4, **options}))


def test_sliding_windows_are_decoded_one_by_one(tmp_path, tokenizer):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4, eos_token_id=None)).save_pretrained(tmp_path)
    target = HFTargetEngine(tmp_path, layer_ids=[0], dtype="float32", device="cpu")
    with pytest.raises(UserError, match=r"need full attention, .* DynamicSlidingWindowLayer: set evaluate.batch_size=1"):
        evaluate_acceptance(target, NoDrafter(), [[1, 2], [3]], Decoding(max_new_tokens=4, batch_size=2))


@pytest.mark.slow
def test_sampling_over_a_tiny_vocabulary_is_the_targets(tmp_path):
    """The joint distribution of three tokens over five symbols, whatever the draft: chi-square against the exact one."""
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SYMBOLS,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=5,
            num_attention_heads=1,
            num_key_value_heads=1,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).save_pretrained(tmp_path)
    target = HFTargetEngine(tmp_path, layer_ids=[1, 2, 3], dtype="float32", device="cpu")
    config = Eagle3Config(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=SYMBOLS,
        draft_vocab_size=3,  # some symbols are never proposed
    )
    drafter = ChainDrafter(Eagle3Draft(config), FrozenTarget.of(target.info, torch.float32).embedding, num_draft_tokens=3)
    prompt, temperature, trials, batch_size = [1, 2, 3], 1.2, 4000, 500
    decoder = SpeculativeDecoder(target, drafter, temperature=temperature)
    counts, num_accepted = torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS), 0
    for first in range(0, trials, batch_size):
        generators = [torch.Generator().manual_seed(first + row) for row in range(batch_size)]
        for one in decoder.generate_batch([prompt] * batch_size, 3, generators):
            counts[tuple(one.tokens)] += 1
            num_accepted += sum(one.accepted_per_position)
    assert num_accepted > trials / 10, "the draft has a share in what comes out"
    every = torch.cartesian_prod(*[torch.arange(SYMBOLS)] * 3)
    with torch.no_grad():
        ids = torch.cat((torch.tensor([prompt]).expand(len(every), -1), every), dim=1)
        log_p = torch.log_softmax(target.model(ids).logits[:, len(prompt) - 1 : -1] / temperature, -1)
    exact = log_p.gather(-1, every[..., None]).sum((1, 2)).exp()
    expected, found = exact * trials, counts.flatten()
    rare = expected < 5
    cells = torch.cat((expected[~rare], expected[rare].sum(0, keepdim=True)))
    seen = torch.cat((found[~rare], found[rare].sum(0, keepdim=True)))
    freedom = len(cells) - 1
    chi_square = ((seen - cells) ** 2 / cells).sum().item()
    assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5 + 5, "about 0.1 %"

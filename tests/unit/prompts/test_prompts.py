import json
from pathlib import Path

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts import load_prompts
from lightning_dataflow.prompts.conversation import normalise
from lightning_dataflow.prompts.masking import Encoder, Unusable
from lightning_dataflow.prompts.preview import render_mask

PLAIN_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3: only the last assistant turn shows an (empty) thought, so earlier turns are rendered otherwise in the middle.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "one cat"},
    {"role": "assistant", "content": "two cats"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "three"},
)


def write(folder: Path, *lines) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(file)


def supervised(tokenizer, encoded) -> list[str]:
    """The supervised stretches, decoded."""
    text, inside = [], False
    for token, flag in zip(*encoded, strict=True):
        if flag and not inside:
            text.append([])
        if flag:
            text[-1].append(token)
        inside = bool(flag)
    return [tokenizer.decode(ids) for ids in text]


SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
QUESTION_AND_ANSWER = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "record",
    [
        SHAREGPT,
        {"messages": QUESTION_AND_ANSWER},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, QUESTION_AND_ANSWER[1]]},
        {"instruction": "q", "input": "", "output": "a"},
        {"conversations": QUESTION_AND_ANSWER},
    ],
)
def test_three_shapes_become_one(record):
    assert normalise(record, "auto", "here") == tuple(QUESTION_AND_ANSWER)


def test_alpaca_input_and_system():
    record = {"instruction": "add", "input": "1 2", "output": "3", "system": "count"}
    assert [m["content"] for m in normalise(record, "alpaca", "here")] == ["count", "add\n\n1 2", "3"]


@pytest.mark.parametrize("template", [None, PLAIN_CHATML], ids=["generation tag", "growing prefixes"])
def test_exactly_the_assistants_tokens(tokenizer, template):
    encoded = Encoder(tokenizer, template).encode(TURNS)
    assert supervised(tokenizer, encoded) == ["two cats<|im_end|>", "three<|im_end|>"]


def test_both_ways_agree_token_by_token(tokenizer):
    conversation = TURNS
    assert Encoder(tokenizer).encode(conversation) == Encoder(tokenizer, PLAIN_CHATML).encode(conversation)


def test_a_template_that_renders_the_last_turn_otherwise(tokenizer):
    encoded = Encoder(tokenizer, THINKING).encode(TURNS)
    assert supervised(tokenizer, encoded) == ["two cats<|im_end|>", "<think></think>three<|im_end|>"]


def test_a_generation_prompt_that_opens_a_thought(tokenizer):
    opening = PLAIN_CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    encoded = Encoder(tokenizer, opening).encode(TURNS)
    assert supervised(tokenizer, encoded) == ["two cats<|im_end|>", "three<|im_end|>"]


def test_broken_and_refusing_templates(tokenizer, conversations):
    with pytest.raises(UserError, match="not valid Jinja"):
        load_prompts(str(conversations), tokenizer, max_length=64, chat_template="{% for %}")
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"96 refused by the chat template \(roles must alternate\)"):
        load_prompts(str(conversations), tokenizer, max_length=64, chat_template=refusing)


def test_a_tool_call_without_content(tokenizer):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    turns = ({"role": "user", "content": "q"}, call, {"role": "tool", "content": "r"}, TURNS[-1])
    shown = "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ m.get('content', 'call') }}{% endfor %}"
    with pytest.raises(Unusable, match="rewrites earlier turns"):
        Encoder(tokenizer, THINKING.replace("{{ message['content'] }}", "{{ message.content }}")).encode(turns)
    assert Encoder(tokenizer, shown).encode(turns)


def test_a_template_that_drops_earlier_turns_is_noticed(tokenizer):
    dropping = "{% for m in messages[-1:] %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(Unusable, match="rewrites earlier turns"):
        Encoder(tokenizer, dropping).encode(TURNS)


def test_text_and_tokens(tokenizer, tmp_path):
    path = write(tmp_path, {"text": "blue bird"}, {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 0, 1]})
    text, tokens = load_prompts(path, tokenizer, max_length=64)[0]
    assert tokenizer.decode(text.input_ids) == "blue bird"
    assert set(text.loss_mask) == {1}
    assert (tokens.input_ids, tokens.loss_mask) == ((5, 6, 7, 8), (0, 0, 0, 1))
    assert tokens.question == (5, 6, 7)
    assert len(text.question) == len(text.input_ids) // 2


def test_truncation_is_by_whole_tokens_and_filters_are_counted(tokenizer, tmp_path):
    long_question = {"instruction": "x" * 200, "output": "a"}
    no_answer = {"messages": [{"role": "user", "content": "q"}]}
    answer_first = {"messages": [QUESTION_AND_ANSWER[1], *QUESTION_AND_ANSWER]}
    nothing = {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]}
    early = {"input_ids": [1, 2, 3], "loss_mask": [1, 1, 0]}  # tokens 0 and 1 are nobody's label
    path = write(tmp_path, SHAREGPT, long_question, no_answer, answer_first, nothing, early, {"text": "y" * 500})
    training, held_out = load_prompts(path, tokenizer, max_length=100)
    assert [len(prompt.input_ids) for prompt in training] == [len(training[0].input_ids), 100]
    assert not held_out
    assert training.skipped == {
        "nothing supervised within max_length": 2,
        "no assistant turn": 1,
        "begins with an assistant turn": 1,
        "nothing supervised": 1,
    }


def test_held_out_prompts_come_first_and_are_not_trained_on(tokenizer, conversations):
    few, held_out = load_prompts(str(conversations), tokenizer, max_length=128, num_eval_samples=5, num_samples=10)
    everything, same = load_prompts(str(conversations), tokenizer, max_length=128, num_eval_samples=5)
    assert list(held_out) == list(same)
    assert list(few) == list(everything[:10])
    assert not {p.source_id for p in everything} & {p.source_id for p in held_out}


def test_token_counts(tokenizer, tmp_path):
    path = write(tmp_path, {"input_ids": [5, 6, 7, 7], "loss_mask": [0, 1, 1, 1]})
    counts = load_prompts(path, tokenizer, max_length=8)[0].token_counts(10)
    assert counts.tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 0, 0]


def test_a_token_outside_the_vocabulary(tokenizer, tmp_path):
    path = write(tmp_path, {"input_ids": [5, 6, 700]})
    prompts = load_prompts(path, tokenizer, max_length=8)[0]
    with pytest.raises(UserError, match="record 00000001 has token id 700, the target's vocabulary has 320"):
        prompts.check_target(320, 100)
    with pytest.raises(UserError, match=r"set data\.max_length to at most 2"):
        prompts.check_target(1000, 2)


def test_the_version_tells_prompts_apart(tokenizer, conversations):
    def version(**options) -> str:
        return load_prompts(str(conversations), tokenizer, **{"max_length": 128} | options)[0].version

    assert version() == version()
    assert len({version(), version(max_length=100), version(num_eval_samples=1), version(num_samples=3)}) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([SHAREGPT, "{broken"], r"line 2: not JSON .* correct or remove the line"),
        (
            [SHAREGPT, f'{{"input_ids": [{"9" * 5000}]}}'],
            r"prompts.*, line 2: a number has more than 4300 digits; expected",
        ),
        ([SHAREGPT, "[" * 100_000], r"line 2: lists or objects are nested too deeply; expected one JSON object a line"),
        ([SHAREGPT, "[1, 2]"], r"line 2: a JSON list"),
        ([SHAREGPT, {"question": "q"}], r"record 2: keys \['question'\] fit no format"),
        ([{"conversations": [{"from": "martian", "value": "q"}]}], r"record 1: not a record of format sharegpt"),
        ([{"messages": [{"role": "user"}]}], r"record 1: not a record of format messages"),
        ([{"input_ids": [1, 2], "loss_mask": [1]}], "2 input_ids, 1 loss_mask"),
        ([{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]}], r"no prompts left .* 1 nothing supervised"),
        ([""], "the file is empty"),
    ],
)
def test_bad_files(tokenizer, tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as raised:
        load_prompts(write(tmp_path, *lines), tokenizer, max_length=64)
    assert "\n" not in str(raised.value)


def test_other_bad_input(tokenizer, tmp_path, conversations):
    with pytest.raises(UserError, match=r"no prompt file .*nowhere\.jsonl"):
        load_prompts("nowhere.jsonl", tokenizer, max_length=64)
    with pytest.raises(UserError, match="use one of auto, tokens, sharegpt"):
        load_prompts(str(conversations), tokenizer, max_length=64, format="csv")
    with pytest.raises(UserError, match="use at least 3"):
        load_prompts(str(conversations), tokenizer, max_length=2)
    binary = tmp_path / "prompts.jsonl"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_prompts(str(binary), tokenizer, max_length=64)


def test_no_chat_template(target_path, conversations):
    from lightning_dataflow.targets import load_tokenizer

    tokenizer = load_tokenizer(target_path)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template: set data\.chat_template"):
        load_prompts(str(conversations), tokenizer, max_length=64)


def test_several_named_templates(target_path, conversations):
    from lightning_dataflow.targets import load_tokenizer

    tokenizer = load_tokenizer(target_path)
    expected = load_prompts(str(conversations), tokenizer, max_length=64)[0].version
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    assert load_prompts(str(conversations), tokenizer, max_length=64)[0].version == expected
    tokenizer.chat_template = {"one": "a", "two": "b"}
    with pytest.raises(UserError, match=r"set data\.chat_template"):
        load_prompts(str(conversations), tokenizer, max_length=64)


@pytest.mark.integration
def test_a_hugging_face_data_set(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(SHAREGPT) + "\n")
    assert len(load_prompts(str(folder), tokenizer, max_length=64)[0]) == 1
    with pytest.raises(UserError, match="cannot load data set"):
        load_prompts("nobody/nothing", tokenizer, max_length=64)


def test_the_preview_marks_supervised_tokens(tokenizer, tmp_path):
    prompt = load_prompts(write(tmp_path, SHAREGPT), tokenizer, max_length=64)[0][0]
    shown = render_mask(prompt, tokenizer, colour=False)
    assert "⟦a<|im_end|>⟧" in shown
    assert shown.count("⟦") == 1
    assert "\x1b[30;42ma<|im_end|>\x1b[0m" in render_mask(prompt, tokenizer)

"""Records of every shape as one: conversations, text or token ids; keys that change the meaning are read or refused."""

import json

import numpy as np
import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.records import Conversation, PlainText, normalise
from lightning_dataflow.prompts.tokens import Tokens

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAPES = {
    "sharegpt": {"conversations": TURNS},
    "messages": {"messages": MESSAGES},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "alpaca": {"instruction": "q", "output": "a"},
    "completion": {"prompt": "q ", "completion": "a"},
    "text": {"text": "q a"},
    "tokens": {"input_ids": [1, 2, 3]},
}
CONVERSATIONS = ("sharegpt", "messages", "preference", "alpaca")
PLAIN = Conversation(messages=tuple(MESSAGES))
HUGE = 10**5000
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def read(record, format="auto"):
    return normalise(record, format, "data.jsonl, line 7")


def refused(record, format="auto") -> str:
    with pytest.raises(UserError) as raised:
        read(record, format)
    message = str(raised.value)
    assert message.startswith("data.jsonl, line 7: ")
    assert "\n" not in message
    return message


def answer_of(message: dict, **beside) -> dict:
    """The answer of a record in which it has these keys."""
    return read({"messages": [MESSAGES[0], {"role": "assistant", "content": "a", **message}], **beside}).messages[1]


@pytest.mark.parametrize(
    "record",
    [
        *(SHAPES[shape] for shape in CONVERSATIONS),
        {"conversations": MESSAGES},
        {"conversations": json.dumps(TURNS)},
        {"messages": json.dumps(MESSAGES)},
        {"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, MESSAGES[1]]},
        {"messages": [{"role": "user", "content": ["q"]}, {"role": "assistant", "content": [{"text": "a"}]}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": []},
        {"chosen": MESSAGES, "rejected": MESSAGES},
        {"messages": MESSAGES, "chosen": MESSAGES, "rejected": []},
        {"messages": MESSAGES[:1], "chosen": MESSAGES[1], "rejected": MESSAGES[1]},
        {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "b"}},
        {"conversations": [{"from": None, "value": None, **MESSAGES[0]}, {**TURNS[1], "role": None, "content": None}]},
    ],
)  # fmt: skip
def test_all_shapes_of_a_conversation_become_one(record):
    assert read(record) == PLAIN


def test_text_and_its_prompt():
    assert read({"text": "q a"}) == PlainText(text="q a")
    assert read({"prompt": "q ", "completion": "a"}) == PlainText(text="q a", start=2)


def test_only_the_completion_is_learnt():
    record = {"prompt": [*MESSAGES, MESSAGES[0]], "completion": [{"role": "assistant", "content": "b"}], "system": "s"}
    conversation = read(record)
    assert [message["content"] for message in conversation.messages] == ["s", "q", "a", "q", "b"]
    assert conversation.unsupervised == {0, 1, 2, 3}


def test_the_chosen_answer():
    assert "chosen begins with an answer and there is no prompt" in refused({"chosen": "a", "rejected": "b"})
    both = {"conversations": TURNS, "chosen": {"from": "gpt", "value": "b"}}
    assert "the turns end with an answer that is not the chosen one: keep one" in refused(both)


def test_alpaca_with_input_system_and_history():
    record = {"instruction": "add", "input": "1 2", "output": "3", "system": "count", "history": [["q", "a"]]}
    assert [message["content"] for message in read(record).messages] == ["count", "q", "a", "add\n\n1 2", "3"]


@pytest.mark.parametrize("shape", CONVERSATIONS)
@pytest.mark.parametrize("history", [[["q", "a"]], MESSAGES, json.dumps(MESSAGES), np.array([["q", "a"]])])
def test_a_column_of_earlier_turns(shape, history):
    assert read({**SHAPES[shape], "history": history}).messages == (*MESSAGES, *MESSAGES)


@pytest.mark.parametrize("shape", CONVERSATIONS)
@pytest.mark.parametrize("key", ["system", "system_prompt", "systemMessage"])
def test_a_column_with_the_system_prompt(shape, key):
    system = {"role": "system", "content": "Be kind."}
    assert read({**SHAPES[shape], key: "Be kind."}).messages == (system, *MESSAGES)


def test_the_system_prompt_of_the_first_turn_once_more():
    record = {"conversations": [{"from": "system", "value": "Be kind."}, *TURNS]}
    assert read({**record, "system": "Be kind."}) == read(record)
    assert "the system prompt of the record is not that of its first turn" in refused({**record, "system": "Be rude."})


@pytest.mark.parametrize("shape", CONVERSATIONS)
@pytest.mark.parametrize(
    ("key", "tools"),
    [
        ("tools", [TOOL]),
        ("tools", json.dumps([TOOL])),
        ("tools", np.array([TOOL])),
        ("tools", TOOL),
        ("functions", [TOOL["function"]]),
        ("availableTools", [{"type": "function", **TOOL["function"]}]),
    ],
)
def test_tools_of_every_spelling(shape, key, tools):
    assert read({**SHAPES[shape], key: tools}) == Conversation(messages=PLAIN.messages, tools=(TOOL,))


def test_tools_beside_the_system_prompt_of_a_conversation():
    system = {"role": "system", "content": ""}
    conversation = read({"conversations": [{**system, "tools": [TOOL]}, *MESSAGES]})
    assert conversation == Conversation(messages=(system, *MESSAGES), tools=(TOOL,))
    two = {"tools": [{"name": "f"}], "messages": [{**system, "tools": [TOOL]}, *MESSAGES]}
    assert "the record has two lists of tools that differ: keep one" in refused(two)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("weather", "tools is 'weather', which is not JSON: correct it"),
        ([{"description": "f"}], "the tool {'description': 'f'} has no name: give OpenAI's list of tools"),
        (["weather"], "tools is not a list of functions: give OpenAI's list, or its JSON as text"),
    ],
)
def test_tools_of_no_shape(tools, message):
    assert message in refused({**SHAPES["messages"], "tools": tools})


@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_documents_and_arguments_of_the_template(shape):
    beside = {
        "documents": [{"text": "d"}],
        "chat_template_kwargs": {"tone": "dry", "date": None},
        "enable_thinking": False,
        "reasoning_effort": "high",
    }
    assert read({**SHAPES[shape], **beside}) == Conversation(
        messages=PLAIN.messages,
        documents=({"text": "d"},),
        arguments={"tone": "dry", "enable_thinking": False, "reasoning_effort": "high"},
    )


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize("shape", ["flat", "openai", "json", "older", "sharegpt"])
def test_tool_calls_of_every_spelling(shape, arguments):
    flat = {"name": "f", "arguments": arguments}
    turns = {
        "flat": {"role": "assistant", "content": "", "tool_calls": [flat]},
        "openai": {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "index": 0, "function": flat}]},
        "json": {"role": "assistant", "content": "", "toolCalls": json.dumps([flat])},
        "older": {"role": "assistant", "content": "", "function_call": flat},
        "sharegpt": {"from": "function_call", "value": json.dumps(flat)},
    }
    message = read({"conversations": [MESSAGES[0], turns[shape]]}).messages[1]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert message == {"role": "assistant", "content": None if shape == "sharegpt" else "", "tool_calls": [call]}


def test_parallel_calls_without_text_and_their_answers():
    calls = [
        {"id": f"c{index}", "function": {"name": "f", "arguments": text}} for index, text in enumerate(("{}", "", None))
    ]
    answers = [{"role": "tool", "tool_call_id": f"c{index}", "content": "3"} for index in range(3)]
    record = {"messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": calls}, *answers]}
    _, called, *rest = read(record).messages
    expected = [{"id": f"c{index}", "type": "function", "function": {"name": "f", "arguments": {}}} for index in range(3)]
    assert called == {"role": "assistant", "content": None, "tool_calls": expected}
    assert rest == answers
    assert "message 2: arguments is '{a', which is not JSON" in refused(
        {"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a"}]}]}
    )


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought", "reasoningContent"])
def test_reasoning_under_each_of_its_names(key):
    expected = {**MESSAGES[1], "reasoning_content": "Hm."}
    assert answer_of({key: "Hm."}) == expected
    assert read({"conversations": [TURNS[0], {**TURNS[1], key: "Hm."}]}).messages[1] == expected
    assert read({**SHAPES["alpaca"], key: "Hm."}).messages[1] == expected


@pytest.mark.parametrize("thought", ["Hm.", [{"type": "text", "text": "Hm."}]])
def test_reasoning_in_a_part_of_the_content(thought):
    parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": "a"}]
    assert answer_of({"content": parts}) == {**MESSAGES[1], "reasoning_content": "Hm."}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": "x"}], "a content part of type image_url: only text is trained on"),
        ([{"type": "text", "text": None}], "message 1: text of a content part is None: give text"),
        (None, "message 1: content is None: give text, or a list of parts with text"),
        ({"a": 1}, "message 1: content is {'a': 1}: give text"),
        ([None], "message 1: a content part is None: give text"),
    ],
)
def test_content_that_is_not_text(content, message):
    assert message in refused({"messages": [{"role": "user", "content": content}, MESSAGES[1]]})


@pytest.mark.parametrize("key", ["weight", "train", "train_on_turn", "training", "loss"])
def test_turns_that_are_not_to_be_learnt(key):
    for no in (0, False, 0.0, [0]):
        flagged = read({"messages": [{**MESSAGES[0], key: no}, {**MESSAGES[1], key: no}]})
        assert flagged == Conversation(messages=PLAIN.messages, unsupervised=frozenset({0, 1}))
    for yes in (1, True, 1.0, None):
        assert read({"messages": [MESSAGES[0], {**MESSAGES[1], key: yes}], "weight": 1.0}) == PLAIN
    assert f"message 1: the key {key} changes" in refused({"messages": [{**MESSAGES[0], key: 1}, MESSAGES[1]]})
    assert f"message 2: the key {key} changes" in refused({"messages": [MESSAGES[0], {**MESSAGES[1], key: 0.5}]})


def test_other_keys_of_a_message_are_for_the_template():
    assert answer_of({"prefix": True, "toolCallId": "c", "name": ""}) == {
        **MESSAGES[1],
        "prefix": True,
        "tool_call_id": "c",
    }


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, Tokens(input_ids=(5, 6, 7), loss_mask=(1, 1, 1))),
        ({"loss_mask": [0, True, 1.0]}, Tokens(input_ids=(5, 6, 7), loss_mask=(0, 1, 1))),
        ({"assistant_masks": [0, 1, 1]}, Tokens(input_ids=(5, 6, 7), loss_mask=(0, 1, 1))),
        ({"completionMask": np.array([0, 1, 1])}, Tokens(input_ids=(5, 6, 7), loss_mask=(0, 1, 1))),
        ({"labels": [-100, 6, 7]}, Tokens(input_ids=(5, 6, 7), loss_mask=(0, 1, 1))),
        ({"labels": [-100, 6, 7], "loss_mask": [1, 1, 0]}, Tokens(input_ids=(5, 6, 7), loss_mask=(0, 1, 0))),
        ({"attention_mask": [0, 1, 1], "position_ids": [1, 0, 1]}, Tokens(input_ids=(6, 7), loss_mask=(1, 1))),
        ({"attention_mask": [1, 1, 0], "labels": [-100, 6, -100]}, Tokens(input_ids=(5, 6), loss_mask=(0, 1))),
    ],
)
def test_masks_of_token_ids(columns, expected):
    tokens = read({"input_ids": [5, 6, 7], **columns})
    assert tokens == expected
    assert all(type(flag) is int for flag in tokens.loss_mask)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": "1 2 3"}, "input_ids is '1 2 3': give a list of token ids"),
        ({"input_ids": {"1": 2}}, "input_ids is {'1': 2}: give a list of token ids"),
        ({"input_ids": [1, 2, -100]}, "input_ids[2] is -100: token ids are integers from 0 to 2147483647"),
        ({"input_ids": [1, 2.0]}, "input_ids[1] is 2.0: token ids are integers"),
        ({"input_ids": [True, 2]}, "input_ids[0] is True: token ids are integers"),
        ({"input_ids": [[1, 2, 3]]}, "input_ids[0] is [1, 2, 3]: token ids are integers"),
        ({"input_ids": [1, 2**31]}, "input_ids[1] is 2147483648: token ids are integers"),
        ({"input_ids": [1, HUGE]}, "input_ids[1] is a number of more than 4300 digits: token ids are integers"),
        ({"input_ids": [1, 2, 3], "loss_mask": []}, "3 input_ids, 0 loss_mask entries: give 0 or 1 for each"),
        ({"input_ids": [1, 2], "loss_mask": ""}, "loss_mask is '': give a list"),
        ({"input_ids": [1, 2], "loss_mask": ["0", "1"]}, "loss_mask[0] is '0': give 1 where a token is supervised, else 0"),
        ({"input_ids": [1, 2], "loss_mask": [1, -100]}, "loss_mask[1] is -100: give 1 where"),
        ({"input_ids": [1, 2], "loss_mask": [1, None]}, "loss_mask[1] is None: give 1 where"),
        ({"input_ids": [1, 2], "assistant_masks": [1, HUGE]}, "assistant_masks[1] is a number of more than 4300 digits"),
        ({"input_ids": [1, 2], "labels": [2, 3]}, "labels[0] is 2 and input_ids[0] is 1: give the token itself"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids, labels [1]: give one for each"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask hides tokens between others, or all"),
        ({"input_ids": [1, 2, 3], "attention_mask": [0, 0, 0]}, "attention_mask hides tokens between others, or all"),
        ({"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]}, "position_ids do not count from 0"),
        ({"conversations": [{"from": HUGE}]}, "message 1: from is a number of more than 4300 digits: use system, human,"),
        ({"conversations": [{"from": "martian", "value": "q"}]}, "message 1: from is 'martian': use system, human,"),
        ({"conversations": [{"from": None, "value": "q"}]}, "message 1: role is None: give role and content"),
        ({"messages": [{"role": 5, "content": "q"}]}, "message 1: role is 5: give role"),
        ({"messages": ["q"]}, "message 1: a turn is 'q': give role"),
        ({"messages": 5}, "messages is 5: give a list of messages"),
        ({"messages": "x"}, "messages is 'x', which is not JSON"),
        ({"question": "q"}, "keys ['question'] fit no format; expected conversations (from/value), messages"),
    ],
)  # fmt: skip
def test_records_of_another_kind(record, message):
    assert f"data.jsonl, line 7: {message}" in refused(record)

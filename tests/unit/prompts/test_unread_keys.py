"""Keys that change what a record means and are not supported are refused by name; all others are passed over."""

import json
import reprlib

import numpy as np
import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts import load_prompts
from lightning_dataflow.prompts.conversation import Tokens, normalise

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAPES = {
    "sharegpt": {"conversations": TURNS},
    "messages": {"messages": MESSAGES},
    "alpaca": {"instruction": "q", "output": "a"},
    "text": {"text": "q a"},
    "tokens": {"input_ids": [1, 2, 3]},
}
CONVERSATIONS = ("sharegpt", "messages", "alpaca")
HUGE = 10**5000
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def refused(record, format="auto") -> str:
    with pytest.raises(UserError) as raised:
        normalise(record, format, "data.jsonl, record 7")
    message = str(raised.value)
    assert message.startswith("data.jsonl, record 7: ")
    assert "\n" not in message
    return message


def spoilt(shape: str, key: str, value) -> dict:
    """A record whose first turn has that key too."""
    ((name, (first, *others)),) = SHAPES[shape].items()
    return {name: [{**first, key: value}, *others]}


@pytest.mark.parametrize(
    ("shapes", "key", "value", "remedy"),
    [
        (("sharegpt", "messages", "text"), "system", "Be kind.", "give it as the first turn, with the role system"),
        ((*CONVERSATIONS, "text"), "system_prompt", "Be kind.", "give it as the first turn, with the role system"),
        ((*CONVERSATIONS, "text"), "history", [["q", "a"]], "give the earlier turns in the conversation itself"),
        ((*CONVERSATIONS, "text"), "tools", TOOLS, "render the conversation yourself and give input_ids and loss_mask"),
        (CONVERSATIONS, "tools", json.dumps(TOOLS), "render the conversation yourself"),
        (CONVERSATIONS, "functions", [{"name": "weather"}], "render the conversation yourself"),
        (CONVERSATIONS, "documents", [{"text": "d"}], "render the conversation yourself"),
        (CONVERSATIONS, "chat_template_kwargs", {"enable_thinking": False}, "render the conversation yourself"),
        (CONVERSATIONS, "enable_thinking", False, "render the conversation yourself"),
        (CONVERSATIONS, "available_tools", TOOLS, "render the conversation yourself"),
        (CONVERSATIONS, "tools", np.array(TOOLS), "render the conversation yourself"),
        (("sharegpt",), "chosen", {"from": "gpt", "value": "b"}, "make the chosen answer a turn"),
        (("alpaca",), "context", "The text.", "call it input"),
        (("alpaca",), "reasoning_content", "Hm.", "give the conversation as `messages`"),
        (tuple(SHAPES), "images", ["cat.png"], "only text is trained on"),
        (tuple(SHAPES), "weight", 0, "all supervised tokens count alike"),
        (tuple(SHAPES), "weight", np.array([1.0, 0.5]), "all supervised tokens count alike"),
        (tuple(SHAPES), "token_weights", [1.0, 0.5, 1.0], "all supervised tokens count alike"),
        (tuple(SHAPES), "labels", np.array([-100, 2, 3]), "give loss_mask, 0 where a label is -100"),
        (tuple(SHAPES), "lossMask", [0, 1, 1], "give input_ids with a loss_mask"),
        (tuple(SHAPES), "assistant_masks", np.array([[0, 1, 1]]), "give input_ids with a loss_mask"),
        (tuple(SHAPES), "completion_mask", "0,1,1", "give input_ids with a loss_mask"),
        (tuple(SHAPES), "labels", [-100, 2, 3], "give loss_mask, 0 where a label is -100"),
        (tuple(SHAPES), "attention_mask", [0, 1, 1], "without padding"),
        (tuple(SHAPES), "position_ids", [0, 1, 0], "give one sample a record"),
        (tuple(SHAPES), "assistant_masks", [0, 1, 1], "give input_ids with a loss_mask"),
        (tuple(SHAPES), "completion_mask", [0, 1, 1], "give input_ids with a loss_mask"),
        ((*CONVERSATIONS, "text"), "loss_mask", [0, 1], "give input_ids with a loss_mask"),
    ],
)
def test_a_key_of_the_record_that_nothing_reads(shapes, key, value, remedy):
    for shape in shapes:
        for format in ("auto", shape):
            message = refused({**SHAPES[shape], key: value}, format)
            assert f"record 7: the key {key} changes what is trained on and is not supported yet: " in message
            assert remedy in message


@pytest.mark.parametrize(
    ("shapes", "key", "value", "remedy"),
    [
        (("sharegpt",), "tool_calls", [{"function": {"name": "f"}}], "give the conversation as `messages`"),
        (("sharegpt",), "function_call", {"name": "f"}, "give the conversation as `messages`"),
        (("sharegpt",), "reasoning_content", "Hm.", "give the conversation as `messages`"),
        (("sharegpt",), "thinking", "Hm.", "give the conversation as `messages`"),
        (("sharegpt",), "tools", TOOLS, "render the conversation yourself"),
        (("sharegpt",), "functions", TOOLS, "render the conversation yourself"),
        (("sharegpt",), "documents", [{"text": "d"}], "render the conversation yourself"),
        (("sharegpt",), "chat_template_kwargs", {"enable_thinking": False}, "render the conversation yourself"),
        (("sharegpt",), "history", [["q", "a"]], "give the earlier turns in the conversation itself"),
        (("sharegpt",), "system", "Be kind.", "give it as the first turn"),
        (("sharegpt",), "toolCalls", [{"function": {"name": "f"}}], "give the conversation as `messages`"),
        (("sharegpt", "messages"), "weight", np.array([0.5]), "all supervised tokens count alike"),
        (("sharegpt",), "image", "cat.png", "only text is trained on"),
        (("sharegpt", "messages"), "weight", 0.5, "all supervised tokens count alike"),
        (("sharegpt", "messages"), "train", True, "give input_ids with a loss_mask"),  # of the user's turn
        (("sharegpt", "messages"), "train_on_turn", True, "give input_ids with a loss_mask"),
        (("sharegpt", "messages"), "loss_mask", [0], "give input_ids with a loss_mask"),
    ],
)
def test_a_key_of_a_turn_that_nothing_reads(shapes, key, value, remedy):
    for shape in shapes:
        message = refused(spoilt(shape, key, value))
        assert f"record 7: turn 1: the key {key} changes what is trained on and is not supported yet: " in message
        assert remedy in message


def test_an_answer_that_is_not_to_be_learnt():
    for flag in ("weight", "train", "loss"):
        message = refused({"messages": [MESSAGES[0], {**MESSAGES[1], flag: 0}]})
        assert f"turn 2: the key {flag} changes" in message


def test_weights_that_say_what_is_done_anyway():
    plain = normalise(SHAPES["sharegpt"], "auto", "here")
    for user, assistant in ((0, 1), (False, True), (0.0, 1.0), (None, None)):
        turns = [{**TURNS[0], "weight": user}, {**TURNS[1], "weight": assistant}]
        assert normalise({"conversations": turns, "weight": 1.0}, "auto", "here") == plain


def test_tools_beside_the_system_prompt_of_chatglm():
    turns = [{"role": "system", "content": "", "tools": TOOLS}, *MESSAGES]
    assert "turn 1: the key tools changes" in refused({"conversations": turns})


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_the_system_prompt_of_the_first_turn_once_more(key):
    for record in (
        {"conversations": [{"from": "system", "value": "Be kind."}, *TURNS]},
        {"messages": [{"role": "system", "content": "Be kind."}, *MESSAGES]},
    ):
        assert normalise({**record, key: "Be kind."}, "auto", "here") == normalise(record, "auto", "here")
        assert f"the key {key} changes" in refused({**record, key: "Be rude."})


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_tokenizer_and_the_privacy_of_texts_leave(shape):
    privacy = [{"value": "Ann", "label": "NAME", "start": 3}]
    beside = {"special_tokens_mask": [1, 0, 0], "privacy_mask": privacy, "attention_mask": [1, 1, 1]}
    plain = normalise(SHAPES[shape], "auto", "here")
    assert normalise({**SHAPES[shape], **beside}, "auto", "here") == plain
    arrays = {"special_tokens_mask": np.array([1, 0, 0]), "attention_mask": np.ones(3), "token_weights": np.ones(3)}
    assert normalise({**SHAPES[shape], **arrays, "privacy_mask": str(privacy)}, "auto", "here") == plain


def test_turns_of_two_shapes_in_one_column():
    turns = [{"from": None, "value": None, "role": "user", "content": "q"}, {**TURNS[1], "role": None, "content": None}]
    assert normalise({"conversations": turns}, "auto", "here") == normalise(SHAPES["sharegpt"], "auto", "here")
    assert "KeyError('role')" in refused({"conversations": [{"from": None, "value": "q"}]})
    assert "expected text, got NoneType" in refused({"conversations": [{"from": "human", "value": None}]})


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


EMPTY = [
    None,
    *("", "[]", "{}", "null"),
    *([], {}, np.array([])),
    *([None], [["", ""]], [{"id": None, "function": {"name": None}}], np.array([None])),
    {"enable_thinking": None, "tools": []},
    nested(5000),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("empty", EMPTY, ids=lambda empty: reprlib.repr(empty))
def test_empty_values_change_nothing(shape, empty):
    """As data sets have them where a row is without a column."""
    plain = normalise(SHAPES[shape], "auto", "here")
    names = "system_prompt history tools chat_template_kwargs labels attention_mask chosen images weight context"
    assert normalise({**SHAPES[shape], **dict.fromkeys(names.split(), empty)}, "auto", "here") == plain
    if shape == "sharegpt":
        assert normalise(spoilt(shape, "tool_calls", empty), "auto", "here") == plain


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_without_a_meaning_for_training_are_passed_over(shape):
    beside = {
        "id": "a1",
        "source": "web",
        "lang": "en",
        "model": "m",
        "meta": {"x": 1},
        "score": 0.5,
        "label": 1,
        "prompt": "q",
    }
    assert normalise({**SHAPES[shape], **beside}, "auto", "here") == normalise(SHAPES[shape], "auto", "here")
    if shape == "sharegpt":
        assert normalise(spoilt(shape, "markdown", "q"), "auto", "here") == normalise(SHAPES[shape], "auto", "here")


def test_keys_of_a_shape_that_was_not_chosen_are_passed_over():
    """A data set that was rendered and tokenised keeps its columns."""
    every = {key: value for shape in SHAPES.values() for key, value in shape.items()} | {"tools": TOOLS, "system": "s"}
    assert normalise(every, "auto", "here") == normalise(SHAPES["tokens"], "auto", "here")
    assert normalise(every, "text", "here") == normalise(SHAPES["text"], "auto", "here")
    tokenised = {**SHAPES["tokens"], **SHAPES["messages"], "attention_mask": [1, 1, 1], "labels": [-100, 2, 3]}
    assert "the key labels" in refused(tokenised)
    assert normalise(tokenised, "messages", "here") == normalise(SHAPES["messages"], "auto", "here")
    absent = {**SHAPES["messages"], "input_ids": None, "conversations": None}
    assert normalise(absent, "auto", "here") == normalise(SHAPES["messages"], "auto", "here")


def test_what_a_chat_template_reads_of_a_message_goes_to_it():
    answer = {"role": "assistant", "content": "a", "reasoning_content": "Hm.", "tool_calls": [{"function": {"name": "f"}}]}
    record = {"messages": [MESSAGES[0], answer]}
    assert normalise(record, "auto", "here") == (MESSAGES[0], answer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": "1 2 3"}, "input_ids is '1 2 3': give a list of token ids"),
        ({"input_ids": {"1": 2}}, "input_ids is {'1': 2}: give a list of token ids"),
        ({"input_ids": [1, 2, -100]}, "input_ids[2] is -100: token ids are integers from 0 to 2147483647"),
        ({"input_ids": [1, 2.0]}, "input_ids[1] is 2.0: token ids are integers"),
        ({"input_ids": [True, 2]}, "input_ids[0] is True: token ids are integers"),
        ({"input_ids": ["1", "2"]}, "input_ids[0] is '1': token ids are integers"),
        ({"input_ids": [[1, 2, 3]]}, "input_ids[0] is [1, 2, 3]: token ids are integers"),
        ({"input_ids": [1, 2**31]}, "input_ids[1] is 2147483648: token ids are integers"),
        ({"input_ids": [1, 2, 3], "loss_mask": []}, "3 input_ids, 0 loss_mask entries: give 0 or 1 for each"),
        ({"input_ids": [1, 2, 3], "loss_mask": [1]}, "3 input_ids, 1 loss_mask entries: give 0 or 1 for each"),
        ({"input_ids": [1, 2], "loss_mask": ""}, "loss_mask is '': give a list"),
        ({"input_ids": [1, 2], "loss_mask": "01"}, "loss_mask is '01': give a list"),
        ({"input_ids": [1, 2], "loss_mask": ["0", "1"]}, "loss_mask[0] is '0': give 1 where a token is supervised, else 0"),
        ({"input_ids": [1, 2], "loss_mask": [1, -100]}, "loss_mask[1] is -100: give 1 where"),
        ({"input_ids": [1, 2], "loss_mask": [1, 0.5]}, "loss_mask[1] is 0.5: give 1 where"),
        ({"input_ids": [1, HUGE]}, "input_ids[1] is a number of more than 4300 digits: token ids are integers"),
        ({"input_ids": HUGE}, "input_ids is a number of more than 4300 digits: give a list"),
        ({"input_ids": [1, 2], "loss_mask": [1, HUGE]}, "loss_mask[1] is a number of more than 4300 digits: give 1"),
        ({"conversations": [{"from": HUGE}]}, "not a record of format sharegpt (a number of more than 4300 digits)"),
        ({"input_ids": np.ones((9, 9))}, "input_ids is array("),
        ({"input_ids": [1, 2], "loss_mask": [1, None]}, "loss_mask[1] is None: give 1 where"),
    ],
)
def test_token_ids_and_masks_of_another_kind(record, message):
    assert f"data.jsonl, record 7: {message}" in refused(record)


@pytest.mark.parametrize("mask", [[0, 1, 1], [False, True, True], [0.0, 1.0, 1.0]])
def test_masks_of_numbers_and_of_flags(mask):
    read = normalise({"input_ids": [1, 2, 3], "loss_mask": mask}, "auto", "here")
    assert read == Tokens(input_ids=(1, 2, 3), loss_mask=(0, 1, 1))
    assert all(type(flag) is int for flag in read.loss_mask)


def test_rows_of_a_data_set_without_a_column(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"messages": MESSAGES}, {"messages": MESSAGES, "tools": [{"name": "f"}]}]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"set, record 2: the key tools changes what is trained on"):
        load_prompts(str(folder), tokenizer, max_length=64)

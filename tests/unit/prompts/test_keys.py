"""Keys that change what a record means are read or refused by name; all others, and empty ones, are passed over."""

import reprlib

import numpy as np
import pytest

from tests.unit.prompts.test_records import CONVERSATIONS, PLAIN, SHAPES, TOOL, read, refused


def spoilt(shape: str, key: str, value) -> dict:
    """A record whose first turn has that key too."""
    ((name, (first, *others)),) = SHAPES[shape].items()
    return {name: [{**first, key: value}, *others]}


@pytest.mark.parametrize(
    ("shapes", "key", "value", "remedy"),
    [
        (("text", "completion"), "system_prompt", "Be kind.", "render the conversation yourself"),
        (("text", "completion"), "history", [["q", "a"]], "render the conversation yourself"),
        (("text", "completion"), "tools", [TOOL], "render the conversation yourself"),
        (("text", "completion"), "reasoning_effort", "high", "render the conversation yourself"),
        (("alpaca",), "context", "The text.", "call it input"),
        (("completion",), "label", False, "it says that the answer is a bad one, so remove the record"),
        (CONVERSATIONS, "kto_tag", False, "it says that the answer is a bad one, so remove the record"),
        (("sharegpt", "messages", "preference", "text"), "reasoningContent", "Let me see.", "in the assistant's message"),
        (tuple(SHAPES), "images", ["cat.png"], "only text is trained on"),
        (tuple(SHAPES), "weight", 0, "all supervised tokens count alike"),
        (tuple(SHAPES), "weight", np.array([1.0, 0.5]), "all supervised tokens count alike"),
        (tuple(SHAPES), "token_weights", [1.0, 0.5, 1.0], "all supervised tokens count alike"),
        (tuple(SHAPES), "custom_mask", [0, 1, 1], "give input_ids with a loss_mask"),
        (tuple(SHAPES), "seq_lengths", [1, 2], "give one sample a record"),
        ((*CONVERSATIONS, "text"), "labels", np.array([-100, 2, 3]), "give it with input_ids"),
        ((*CONVERSATIONS, "text"), "lossMask", [0, 1, 1], "give input_ids with a loss_mask"),
        ((*CONVERSATIONS, "text"), "assistant_masks", np.array([[0, 1, 1]]), "give input_ids with a loss_mask"),
        ((*CONVERSATIONS, "text"), "completion_mask", "0,1,1", "give input_ids with a loss_mask"),
        ((*CONVERSATIONS, "text"), "attention_mask", [0, 1, 1], "without packing"),
        ((*CONVERSATIONS, "text"), "position_ids", [0, 1, 0], "give one sample a record"),
    ],
)  # fmt: skip
def test_a_key_of_the_record_that_nothing_reads(shapes, key, value, remedy):
    for shape in shapes:
        for format in ("auto", shape):
            message = refused({**SHAPES[shape], key: value}, format)
            assert f"line 7: the key {key} changes what is trained on and is not supported: " in message
            assert remedy in message


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("documents", [{"text": "d"}], "give it in the record"),
        ("chat_template_kwargs", {"enable_thinking": False}, "give it in the record"),
        ("history", [["q", "a"]], "give it in the record"),
        ("system", "Be kind.", "give it in the record"),
        ("train_detail", [{"begin_offset": 0}], "give input_ids with a loss_mask"),
        ("loss_mask", [0], "give input_ids with a loss_mask"),
        ("weight", np.array([0.5]), "all supervised tokens count alike"),
        ("image", "cat.png", "only text is trained on"),
    ],
)
def test_a_key_of_a_turn_that_nothing_reads(key, value, remedy):
    for shape in ("sharegpt", "messages"):
        message = refused(spoilt(shape, key, value))
        assert f"line 7: message 1: the key {key} changes what is trained on and is not supported: " in message
        assert remedy in message


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
    names = "system_prompt history tools documents chat_template_kwargs labels attention_mask images weight context"
    columns = {name: empty for name in names.split()} | ({} if shape == "preference" else {"chosen": empty})
    assert read({**columns, **SHAPES[shape]}) == read(SHAPES[shape])
    if shape == "sharegpt":
        assert read(spoilt(shape, "tool_calls", empty)) == PLAIN


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_without_a_meaning_for_training_are_passed_over(shape):
    privacy = [{"value": "Ann", "label": "NAME", "start": 3}]
    beside = {
        "id": "a1",
        "source": "web",
        "meta": {"x": 1},
        "score": 0.5,
        "label": 1,
        "kto_tag": True,
        "privacy_mask": privacy,
    }
    tokenizers = {"special_tokens_mask": np.array([1, 0, 0]), "attention_mask": np.ones(3), "token_weights": np.ones(3)}
    assert read({**SHAPES[shape], **beside, **tokenizers}) == read(SHAPES[shape])


def test_keys_of_a_shape_that_was_not_chosen_are_passed_over():
    """A data set that was rendered and tokenised keeps its columns."""
    every = {key: value for shape in SHAPES.values() for key, value in shape.items()} | {"tools": [TOOL], "system": "s"}
    assert read(every) == read(SHAPES["tokens"])
    assert read(every, "text") == read(SHAPES["text"])
    assert read({**SHAPES["tokens"], **SHAPES["messages"], "labels": [-100, 2, 3]}, "messages") == PLAIN
    assert read({**SHAPES["messages"], "input_ids": None, "conversations": None}) == PLAIN


def test_a_shape_of_which_a_row_has_only_an_empty_list_is_not_its_own():
    assert read({"messages": [], "conversations": [None], "text": "q a"}) == read(SHAPES["text"])
    assert read({"input_ids": [], **SHAPES["alpaca"]}) == PLAIN
    assert read({"messages": []}).messages == ()


def test_a_word_about_reasoning_is_no_reasoning():
    assert read({**SHAPES["messages"], "reasoning": "on", "thinking": True}) == PLAIN

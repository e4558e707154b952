"""Prompts of benchmarks: shapes, rendering, and bad files in one line."""

import json

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts import load_questions

USER = {"role": "user", "content": "q"}


@pytest.fixture
def tokenizer(im):
    return im


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}, "Write."),
        ({"prompt": ["Write.", "Again."]}, "Write."),
        ({"question": "2 + 2?", "answer": "#### 4"}, "2 + 2?"),
        ({"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "assert f()"}, "def f():\n"),
    ],
)
def test_a_question_is_asked_by_the_user(write, tokenizer, record, text):
    (ids,) = load_questions(write(record), tokenizer)
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_of_ones_own_and_none(write, tokenizer):
    path = write({"question": "2 + 2?"})
    (ids,) = load_questions(path, tokenizer, chat_template="Q: {{ messages[0]['content'] }} A:")
    assert tokenizer.decode(ids) == "Q: 2 + 2? A:"
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert tokenizer.decode(load_questions(path, tokenizer)[0]) == "2 + 2?"
    finally:
        tokenizer.chat_template = template


def test_the_first_so_many(write, tokenizer):
    path = write(*({"input_ids": [number, 7]} for number in range(5)))
    assert load_questions(path, tokenizer, num_prompts=2) == [[0, 7], [1, 7]]
    assert len(load_questions(path, tokenizer)) == 5


@pytest.mark.parametrize(
    ("records", "num_prompts", "message"),
    [
        ([{"answer": "4"}], None, r"line 1: keys \['answer'\] have no question; expected turns \(MT-Bench\)"),
        ([{"question": "fine"}, {"question": 4}], None, "line 2: question is not text"),
        ([{"turns": []}], None, "line 1: turns is not text, or a list that begins with text"),
        ([{"prompt": []}], None, "line 1: prompt is an empty list: give a question, or remove the record"),
        ([{"messages": []}], None, "line 1: messages is an empty list: give a question, or remove the record"),
        ([{"input_ids": ["a"]}], None, r"line 1: input_ids\[0\] is 'a': token ids are integers"),
        ([{"input_ids": [1, -1]}], None, r"line 1: input_ids\[1\] is -1: token ids are integers from 0 to"),
        ([{"input_ids": "1 2"}], None, "line 1: input_ids is '1 2': give a list of token ids"),
        ([{"input_ids": []}], None, "line 1: the prompt is empty"),
        ([["question"]], None, "line 1: a JSON list"),
        ([], None, "has no prompts: give a file with some"),
        ([{"question": "one"}], 2, "has 1 prompts, evaluate.num_prompts=2: give more"),
        ([{"question": "one"}], 0, "evaluate.num_prompts=0: ask at least 1 prompt"),
    ],
)
def test_bad_files_are_one_line(write, tokenizer, records, num_prompts, message):
    with pytest.raises(UserError, match=message) as raised:
        load_questions(write(*records), tokenizer, num_prompts=num_prompts)
    assert "\n" not in str(raised.value)


TOOLS = [{"name": "f"}]
TEMPLATE = (
    "{{ tools | length if tools }}{{ documents | length if documents }}{{ tone }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.mark.parametrize("question", [{"prompt": "q"}, {"question": "q"}, {"turns": ["q", "r"]}, {"messages": [USER]}])
@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({}, "<user>q<answer>"),
        ({"system": "s"}, "<system>s<user>q<answer>"),
        ({"history": [["a", "b"]]}, "<user>a<assistant>b<user>q<answer>"),
        ({"tools": TOOLS, "documents": [{"text": "d"}] * 2}, "12<user>q<answer>"),
        ({"functions": json.dumps(TOOLS)}, "1<user>q<answer>"),
        ({"chat_template_kwargs": {"tone": "dry"}}, "dry<user>q<answer>"),
        ({"tools": [None], "system": "", "images": [], "input_ids": None}, "<user>q<answer>"),
    ],
)
def test_what_a_record_says_of_its_question_is_asked_with_it(write, tokenizer, question, columns, text):
    (ids,) = load_questions(write({**question, **columns}), tokenizer, chat_template=TEMPLATE)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("key", ["messages", "prompt"])
def test_the_last_answer_of_a_conversation_is_asked_for(write, tokenizer, key):
    answer = {"role": "assistant", "content": "a"}
    path = write({key: [USER, answer, USER, answer]})
    (ids,) = load_questions(path, tokenizer, chat_template=TEMPLATE)
    assert tokenizer.decode(ids) == "<user>q<assistant>a<user>q<answer>"


def test_arguments_of_the_template(write, tokenizer):
    (ids,) = load_questions(write({"question": "q"}), tokenizer, chat_template=TEMPLATE, template_args={"tone": "dry"})
    assert tokenizer.decode(ids) == "dry<user>q<answer>"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": TOOLS}, "line 2: the chat template drops the tools"),
        ({"system": "s", "chat_template_kwargs": "x"}, "line 2: chat_template_kwargs is 'x', which is not JSON"),
        ({"image": "cat.png"}, "line 2: the key image changes what is asked and is not supported: remove it"),
        ({"turns": [1]}, "line 2: turns is not text, or a list that begins with text"),
    ],
)
def test_a_question_is_not_asked_without_what_belongs_to_it(write, tokenizer, columns, message):
    with pytest.raises(UserError, match=message):
        load_questions(write({"question": "q"}, {"question": "q", **columns}), tokenizer)


def test_token_ids_are_rendered_already(write, tokenizer):
    assert load_questions(write({"input_ids": [3, 4], "question": "q", "tools": TOOLS}), tokenizer) == [[3, 4]]


def test_a_missing_file_names_its_own_setting(tokenizer):
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist: evaluate.data takes"):
        load_questions("nowhere.jsonl", tokenizer)

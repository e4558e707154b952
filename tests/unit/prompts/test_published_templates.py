"""The supervised tokens of published chat templates, and the table of them in docs/prompts.md."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lightning_dataflow.prompts.encoding import Encoder
from lightning_dataflow.prompts.records import Conversation, normalise
from lightning_dataflow.prompts.template import ChatTemplate, Unusable
from tests.unit.prompts.published import (
    FAMILIES,
    KINDS,
    LEFT_OUT,
    MULTI,
    NAMES,
    SINGLE,
    TEMPLATES,
    TODAY,
    TOOL,
    TOOLS,
    conversation,
    tokenizer,
)

TABLE = Path(__file__).parents[3] / "docs" / "prompts.md"
END = "<｜end▁of▁sentence｜>"
LITERAL = {
    "llama_3": ("multi-turn", [["4<|eot_id|>", "6<|eot_id|>"]]),
    "llama_3_2": ("tools", [['{"name": "add", "parameters": {"a": 2}}<|eot_id|>', "It is 4<|eot_id|>"]]),
    "qwen2_5": (
        "tools",
        [['<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>', "It is 4<|im_end|>"]],
    ),
    "qwen3": (
        "thinking",
        [["<think>\nAdd.\n</think>\n\n4<|im_end|>"], ["<think>\nSo.\n</think>\n\n6<|im_end|>"]],
    ),
    "qwen3_5": ("thinking", [["Add.\n</think>\n\n4<|im_end|>"], ["So.\n</think>\n\n6<|im_end|>"]]),
    "gpt_oss": (
        "tools",
        [
            [
                ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>',
                "<|channel|>final<|message|>It is 4<|return|>",
            ]
        ],
    ),
    "deepseek_v3": ("system", [[f"4{END}"]]),
    "deepseek_r1": ("multi-turn", [[f"4{END}", f"6{END}"]]),
    "gemma_2": ("multi-turn", [["4<end_of_turn>", "6<end_of_turn>"]]),
    "gemma_3": ("system", [["4<end_of_turn>"]]),
    "phi_3": ("multi-turn", [["4<|end|>", "6<|end|>"]]),
    "phi_4": ("system", [["4<|im_end|>"]]),
    "mistral": (
        "tools",
        [['[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}, "id": "functions.add:0"}]</s>', " It is 4</s>"]],
    ),
    "glm_4": (
        "tools",
        [
            [
                "\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
                "<|observation|>",
                "\n<think></think>\nIt is 4<|user|>",
            ]
        ],
    ),
    "kimi_k2": (
        "tools",
        [
            [
                "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
                '{"a": 2}<|tool_call_end|><|tool_calls_section_end|><|im_end|>',
                "It is 4<|im_end|>",
            ]
        ],
    ),
    "granite": ("system", [["4<|end_of_text|>"]]),
    "smollm3": (
        "thinking",
        [["<think>\nAdd.\n</think>\n\n4<|im_end|>", "<think>\nSo.\n</think>\n\n6<|im_end|>"]],
    ),
    "cohere": (
        "multi-turn",
        [
            [
                "<|START_RESPONSE|>4<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                "<|START_RESPONSE|>6<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            ]
        ],
    ),
}
"""The supervised texts of each sample of a conversation."""


@cache
def encoder(family: str, **arguments: Any) -> Encoder:
    made = tokenizer(family)
    ends = made.convert_tokens_to_ids(list(FAMILIES[family].ends))
    return Encoder(ChatTemplate(made, template_args=arguments, today=TODAY, end_ids=ends))


def encoded(family: str, sample: Conversation, **arguments: Any) -> list[list[tuple[str, str]]]:
    """(text before, supervised text) of each supervised turn of each sample."""
    made = tokenizer(family)
    samples, _ = encoder(family, **arguments).encode(sample)
    return [
        [(made.decode(one.input_ids[:start]), made.decode(one.input_ids[start:end])) for start, end in one.spans]
        for one in samples
    ]


def supervised(family: str, sample: Conversation, **arguments: Any) -> list[list[str]]:
    return [[text for _, text in turns] for turns in encoded(family, sample, **arguments)]


def render(family: str, sample: Conversation, messages: Sequence[dict[str, Any]], *, prompt: bool, **arguments: Any) -> str:
    """As engines do it. They know the template's name for thoughts, and give empty text for null."""
    named = [
        message | {"thinking": message.get("reasoning_content"), "content": message["content"] or ""}
        for message in messages
    ]
    text = tokenizer(family).apply_chat_template(
        named,
        tools=list(sample.tools) or None,
        add_generation_prompt=prompt,
        tokenize=False,
        strftime_now=TODAY.strftime,
        **arguments,
    )
    return str(text)


def served(family: str, sample: Conversation, **arguments: Any) -> list[tuple[str, str]]:
    """(prompt, answer) of each assistant's turn. The thought that R1's prompt opens is not in the finished turn."""
    about, turns = FAMILIES[family], []
    for index, message in enumerate(sample.messages):
        if message["role"] == "assistant":
            prompt = render(family, sample, sample.messages[:index], prompt=True, **arguments)
            finished = render(family, sample, sample.messages[: index + 1], prompt=False, **arguments)
            if family == "deepseek_r1":
                prompt = prompt.removesuffix("<think>\n")
            assert finished.startswith(prompt)
            answer = finished[len(prompt) :]
            later = [message["role"] for message in sample.messages[index + 1 : index + 2]]
            follows = later or ["tool" if message.get("tool_calls") else "user"]
            answer += about.next_header.get(follows[0], "")
            turns.append((prompt, answer[: min(answer.index(end) + len(end) for end in about.ends if end in answer)]))
    return turns


CALLING = ("qwen2_5", "qwen3", "qwen3_5", "gpt_oss", "mistral", "glm_4", "kimi_k2", "cohere")
SUPPORTED = {
    "calls at once": [family for family in CALLING if family != "gpt_oss"],
    "steps": [*CALLING, "llama_3_2"],
    "call with thought": ["qwen3", "qwen3_5", "glm_4", "cohere"],
    "question after tools": ["qwen3", "qwen3_5", "glm_4"],
    "ends with a call": [*CALLING, "llama_3_2"],
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in FAMILIES for kind in KINDS if kind not in LEFT_OUT.get(family, ())]
    + [(family, kind) for kind, families in SUPPORTED.items() for family in families],
)
def test_supervised_tokens_are_what_an_engine_is_asked_for(family, kind):
    made, sample = tokenizer(family), conversation(family, kind)
    samples, _ = encoder(family).encode(sample)
    found = [
        (one.input_ids[:start].tolist(), one.input_ids[start:end].tolist()) for one in samples for start, end in one.spans
    ]
    wanted = [tuple(made(text, add_special_tokens=False)["input_ids"] for text in turn) for turn in served(family, sample)]
    assert found == wanted
    assert [int(one.loss_mask.sum()) for one in samples] == [
        sum(end - start for start, end in one.spans) for one in samples
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_supervised_text_of_one_conversation(family):
    kind, texts = LITERAL[family]
    assert supervised(family, conversation(family, kind)) == texts


def cell(family: str, kind: str) -> str:
    try:
        samples = supervised(family, conversation(family, kind))
    except Unusable as reason:
        return f"left out: {reason}"
    shown = [[f"`{text}`".replace("\n", "⏎").replace("|", "\\|") for text in turns] for turns in samples]
    return " / ".join(" + ".join(turns) for turns in shown)


def table() -> dict[str, list[str]]:
    rows = [line.strip().strip("|") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [[part.strip() for part in re.split(r"(?<!\\)\|", row)] for row in rows]
    return {first: others for first, *others in cells if first in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_the_documentation_is_true(name):
    assert table()[name] == [cell(NAMES[name], kind) for kind in KINDS]


def test_every_template_has_a_row():
    assert sorted(NAMES.values()) == sorted(file.stem for file in TEMPLATES.glob("*.jinja"))


@pytest.mark.parametrize(
    ("family", "asked", "answer"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "4<|im_end|>"),
        ("qwen3_5", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "4<|im_end|>"),
        ("glm_4", "2+2?/nothink<|assistant|>\n<think></think>", "\n4<|user|>"),
        ("smollm3", "<|im_start|>assistant\n<think>\n\n</think>\n", "4<|im_end|>"),
    ],
)
def test_an_empty_thought_in_the_generation_prompt_is_not_supervised(family, asked, answer):
    [[(before, text)]] = encoded(family, conversation(family, "single"), enable_thinking=False)
    assert (before[-len(asked) :], text) == (asked, answer)


def test_a_system_prompt_can_turn_thoughts_off():
    system = {"role": "system", "content": "Be brief. /no_think"}
    [[(before, text)]] = encoded("smollm3", Conversation(messages=(system, *SINGLE)))
    assert before.endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    assert text == "4<|im_end|>"


def test_dates_are_those_of_the_run():
    dates = {
        family: [text for text in ("04 Mar 2025", "2025-03-04", "March 04, 2025", "04 March 2025") if text in before]
        for family in FAMILIES
        for [(before, _)] in encoded(family, conversation(family, "single"))
    }
    assert {family: found for family, found in dates.items() if found} == {
        "llama_3_2": ["04 Mar 2025"],
        "gpt_oss": ["2025-03-04"],
        "granite": ["March 04, 2025"],
        "smollm3": ["04 March 2025"],
    }


def test_harmony_drops_the_thought_of_a_call_once_the_answer_is_there():
    samples, turns = encoder("gpt_oss").encode(conversation("gpt_oss", "call with thought"))
    assert [turn.reason for turn in turns] == [
        None,
        "the chat template renders earlier messages differently once the turn is finished",
    ]
    assert len(samples) == 1


def test_tools_that_the_template_writes_before_the_last_question_make_a_sample_of_each_turn():
    sample = Conversation(messages=tuple(MULTI), tools=({"type": "function", "function": TOOL},))
    first, second = encoded("mistral", sample)
    assert [text for _, text in (*first, *second)] == [" 4</s>", " 6</s>"]
    assert first[0][0].startswith("<s>[AVAILABLE_TOOLS]")
    assert second[0][0].startswith("<s>[INST] 2+2?[/INST] 4</s>[AVAILABLE_TOOLS]")


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_r1"])
def test_a_template_that_adds_arguments_to_text_gets_them_as_text(family):
    sample = normalise({"messages": TOOLS}, "messages", "here")
    assert supervised(family, sample) == [
        [
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
            '{"a": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
            "It is 4<｜end▁of▁sentence｜>",
        ]
    ]


@pytest.mark.parametrize("family", ["llama_3_2", "mistral", "cohere"])
def test_text_beside_a_call_that_the_template_drops_is_noticed(family):
    messages = [*TOOLS[:1], TOOLS[1] | {"content": "I add."}, *TOOLS[2:]]
    _, turns = encoder(family).encode(normalise({"messages": messages, "tools": [TOOL]}, "messages", "here"))
    assert [turn.reason for turn in turns] == ["the chat template drops the turn's text", None]


def test_calls_of_which_the_template_renders_the_first_are_noticed():
    _, turns = encoder("gpt_oss").encode(conversation("gpt_oss", "calls at once"))
    assert [turn.reason for turn in turns] == ["the chat template drops the turn's further tool calls", None]


def test_a_template_that_refuses_a_call_without_text_reads_the_text():
    source = (TEMPLATES / "qwen2_5.jinja").read_text()
    source += "{{ raise_exception('no text') if messages | selectattr('content', 'equalto', '') | list }}"
    messages = [*TOOLS[:1], TOOLS[1] | {"content": "I add."}, *TOOLS[2:]]
    strict = Encoder(ChatTemplate(tokenizer("qwen2_5"), source))
    _, turns = strict.encode(normalise({"messages": messages}, "messages", "here"))
    assert [turn.reason for turn in turns] == [None, None]

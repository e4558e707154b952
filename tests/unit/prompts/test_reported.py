"""Conversations that people reported as trained wrongly, and others of their kinds, with what is supervised of them."""

import json

import pytest

from lightning_dataflow.contracts import UserError
from tests.unit.prompts.tiny import ASK, ICE, IM, MISTRAL, NO_PROMPT, PLAIN, TAGGED, THINK, byte_tokenizer, chat, show

WEATHER = {"role": "user", "content": "Weather in Oslo?"}
ASKED = "<|im_start|>user\nWeather in Oslo?<|im_end|>\n<|im_start|>assistant\n"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
SPACES = (("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"))
CALLING = PLAIN.replace(
    "{{ m.content }}",
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<f={{ c.function.name }}>{% for k, v in c.function.arguments | items %}<p={{ k }}>{{ v }}</p>{% endfor %}</f>"
    "{% endfor %}",
)
NULL = PLAIN.replace(
    "{{ m.content }}",
    "{% if m['content'] is none %}{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments }}</call>"
    "{% endfor %}{% else %}{{ m['content'] + '' }}{% endif %}",
)
TOOL_CALLS = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | map(attribute='function.name') | join(',') }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}[TOOL_CALLS]"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}</s>{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)


def call(arguments, **message) -> dict:
    function = {"name": "weather", "arguments": arguments}
    tool_calls = [{"id": "c1", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls, **message}


def answered(called: dict) -> dict:
    return {
        "messages": [WEATHER, called, {"role": "tool", "content": "3 C"}, {"role": "assistant", "content": "It is 3 C."}]
    }


def turns(header: str, end: str) -> str:
    """A template whose turns have this header and end."""
    return (
        f"{{% for m in messages %}}{header.replace('ROLE', '{{ m.role }}')}{{{{ m.content }}}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{header.replace('ROLE', 'assistant')}{{% endif %}}"
    )


@pytest.mark.parametrize(
    ("header", "end", "special"),
    [
        ("<|ROLE|>", "<|end|>", ["<|user|>", "<|assistant|>"]),
        ("<|head|>ROLE<|body|>\n\n", "<|eot_id|>", ["<|head|>", "<|body|>"]),
        ("<|im_start|>ROLE\n", "\n<|im_end|>", ["<|im_start|>"]),
        ("ROLE: ", "<eot>", []),
    ],
)
def test_the_end_token_is_not_the_tokenizers_own(header, end, special):
    tokenizer = byte_tokenizer(turns(header, end), [*special, end.strip(), "<|endoftext|>"])
    user, assistant = header.replace("ROLE", "user"), header.replace("ROLE", "assistant")
    rendered = f"{user}Is water wet?{end}{assistant}⟦Yes, it is.{end}⟧{user}And ice?{end}{assistant}⟦Ice is solid.{end}⟧"
    assert show(tokenizer, ICE) == [rendered]
    closing = tokenizer.chat_template.replace(
        "{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add"
    )
    assert show(tokenizer, ICE, closing) == [rendered + "<|endoftext|>"]


@pytest.mark.parametrize(
    ("header", "end", "space"),
    [
        ("<start_of_turn>ROLE\n", "<end_of_turn>", "\n"),
        ("<|im_start|>ROLE\n", "<|im_end|>", "\n\n"),
        ("ROLE: ", "</s>", " "),
        ("<|ROLE|>\n", "<|end|>", "\n\t"),
    ],
)
def test_white_space_follows_the_end_token(header, end, space):
    tokenizer = byte_tokenizer(turns(header, end + "{{ '" + space + "' }}"), [end, "<eos>"])
    user, assistant = header.replace("ROLE", "user"), header.replace("ROLE", "assistant")
    assert show(tokenizer, ICE) == [
        f"{user}Is water wet?{end}{space}{assistant}⟦Yes, it is.{end}⟧{space}"
        f"{user}And ice?{end}{space}{assistant}⟦Ice is solid.{end}⟧{space}"
    ]


def test_a_tool_call_without_text():
    im = byte_tokenizer()
    oslo = call({"city": "Oslo"})
    none, called = "<think>\n\n</think>\n\n", '<call>weather {"city": "Oslo"}</call><|im_end|>'
    assert show(im, answered(oslo), THINK) == [
        f"{ASKED}⟦{none}{called}⟧",
        f"{ASKED}{called}\n<|im_start|>tool\n3 C<|im_end|>\n<|im_start|>assistant\n⟦{none}It is 3 C.<|im_end|>⟧",
    ]
    both = {**oslo, "tool_calls": oslo["tool_calls"] * 2}
    one = "<f=weather><p=city>Oslo</p></f>"
    for message, text in ((oslo, one), (both, one * 2), ({**oslo, "content": "Let me look."}, f"Let me look.{one}")):
        assert show(im, answered(message), CALLING) == [
            f"{ASKED}⟦{text}<|im_end|>⟧\n<|im_start|>tool\n3 C<|im_end|>\n<|im_start|>assistant\n⟦It is 3 C.<|im_end|>⟧\n"
        ]
    mistral = byte_tokenizer(TOOL_CALLS, ["<s>", "</s>"])
    assert show(mistral, answered(oslo)) == [
        '[INST]Weather in Oslo?[/INST]⟦[TOOL_CALLS]{"name": "weather", "arguments": {"city": "Oslo"}}</s>⟧'
        "[TOOL_RESULTS]3 C[/TOOL_RESULTS]⟦ It is 3 C.</s>⟧"
    ]


@pytest.mark.parametrize(
    "columns",
    [{"tools": [TOOL]}, {"tools": json.dumps([TOOL])}, {"functions": [TOOL["function"]]}, {"available_tools": TOOL}],
)
def test_a_column_of_tools_is_rendered(columns):
    record = {**columns, "messages": [WEATHER, {"role": "assistant", "content": "Sure: 3 C."}]}
    listed = f"<|im_start|>system\nTools: {json.dumps([TOOL])}<|im_end|>\n"
    answer = "⟦<think>\n\n</think>\n\nSure: 3 C.<|im_end|>⟧\n"
    assert show(byte_tokenizer(THINK), record) == [listed + ASKED + answer]
    assert show(byte_tokenizer(TOOL_CALLS, ["<s>", "</s>"]), record) == [
        "[AVAILABLE_TOOLS]weather[/AVAILABLE_TOOLS][INST]Weather in Oslo?[/INST]⟦ Sure: 3 C.</s>⟧"
    ]


@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [
        ('{"city": "Oslo"}', '{"city": "Oslo"}'),
        ('{"a": [1, null], "b": {"ü": true}}', '{"a": [1, null], "b": {"ü": true}}'),
        ("", "{}"),
        (" {} ", "{}"),
    ],
)
def test_arguments_that_are_json_text_are_decoded(arguments, rendered):
    record = {"messages": [WEATHER, call(arguments, content="Let me look.")]}
    expected = f"{ASKED}⟦<think>\n\n</think>\n\nLet me look.<call>weather {rendered}</call><|im_end|>⟧\n"
    assert show(byte_tokenizer(THINK), record) == [expected]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [10, 11], "loss_mask": ["0", "1"]}, r"loss_mask\[0\] is '0': give 1 where a token is supervised"),
        ({"input_ids": [10, 11], "loss_mask": []}, "2 input_ids, 0 loss_mask entries: give 0 or 1 for each"),
        ({"input_ids": [10, 11], "loss_mask": "[0, 1]"}, r"loss_mask is '\[0, 1\]': give a list"),
        ({"input_ids": [10, 11], "labels": ["-100", "11"]}, r"labels\[0\] is '-100' and input_ids\[0\] is 10"),
        ({"input_ids": [10, 11], "assistant_masks": {}}, "assistant_masks is {}: give a list"),
        ({"input_ids": [1, 2, -100], "loss_mask": [0, 0, 1]}, r"input_ids\[2\] is -100: token ids are integers from 0"),
        ({"input_ids": [-1, 2, 3]}, r"input_ids\[0\] is -1: token ids are integers from 0"),
        ({"input_ids": [1, 2**40, 3]}, r"input_ids\[1\] is 1099511627776: token ids are integers from 0"),
        ({"input_ids": [1, None, 3]}, r"input_ids\[1\] is None: token ids are integers from 0"),
    ],
)
def test_masks_and_token_ids_that_are_none(record, message):
    with pytest.raises(UserError, match=f"^here: {message}"):
        show(byte_tokenizer(), record)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {
                "system": "Answer in French.",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            },
            "<system>Answer in French.<user>q<assistant>⟦a</s>⟧",
        ),
        (
            {"instruction": "again", "input": "", "output": "c", "history": [["q", "a"]]},
            "<user>q<assistant>⟦a</s>⟧<user>again<assistant>⟦c</s>⟧",
        ),
        ({**chat("q", "a"), "system_prompt": "s"}, "<system>s<user>q<assistant>⟦a</s>⟧"),
        ({"prompt": "q", "chosen": "a", "system": "s"}, "<system>s<user>q<assistant>⟦a</s>⟧"),
        ({**chat("q", "a"), "history": chat("x", "y")["messages"]}, "<user>x<assistant>⟦y</s>⟧<user>q<assistant>⟦a</s>⟧"),
    ],
)
def test_columns_with_the_system_prompt_and_earlier_turns_are_rendered(record, expected):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert show(byte_tokenizer(template, ["</s>"]), record) == [expected]


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
@pytest.mark.parametrize(
    "answer",
    ["if x:\n        y = 1\n        z =      2", "        y = 1", "a    \n\n    b    ", "  \t  - item\n        - item"],
)
def test_spaces_of_code_are_learnt_though_offsets_leave_them_out(template, answer):
    tokenizer = byte_tokenizer(template, trim=True, merges=SPACES)
    assert show(tokenizer, chat("code", answer, "more", "done it")) == [
        f"<|im_start|>user\ncode<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n⟦done it<|im_end|>⟧\n"
    ]


@pytest.mark.parametrize(
    ("template", "user", "assistant", "end"),
    [
        (NO_PROMPT, "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        (PLAIN.replace(ASK, "{% if false %}{% endif %}"), "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        (turns("[ROLE]\n\n", "<|im_end|>").split("{% if")[0], "[user]\n\n", "[assistant]\n\n", "<|im_end|>"),
        (turns("### ROLE: ", "<|im_end|>\n").split("{% if")[0] + " ", "### user: ", "### assistant: ", "<|im_end|>\n"),
    ],
)
def test_the_header_of_a_template_without_generation_prompt_is_not_learnt(template, user, assistant, end):
    (shown,) = show(byte_tokenizer(), ICE, template)
    token, space = IM[1], end.removeprefix(IM[1])
    assert (
        shown.rstrip()
        == (
            f"{user}Is water wet?{end}{assistant}⟦Yes, it is.{token}⟧{space}"
            f"{user}And ice?{end}{assistant}⟦Ice is solid.{token}⟧{space}"
        ).rstrip()
    )


@pytest.mark.parametrize("arguments", ["{}", {}, None, '{"a": 1}'])
def test_null_content_with_a_tool_call_stays_null(arguments):
    text = '{"a": 1}' if arguments == '{"a": 1}' else "{}"
    expected = (
        f"{ASKED}⟦<call>weather {text.replace(chr(34), chr(39))}</call><|im_end|>⟧\n"
        "<|im_start|>tool\n3 C<|im_end|>\n<|im_start|>assistant\n⟦It is 3 C.<|im_end|>⟧\n"
    )
    assert show(byte_tokenizer(NULL), answered(call(arguments, content=None))) == [expected]


def test_mistrals_question_asks_for_the_answer():
    tokenizer = byte_tokenizer(MISTRAL, ["<s>", "</s>"], bos_token="<s>")
    assert show(tokenizer, ICE) == [
        "<s>[INST] Is water wet? [/INST]⟦ Yes, it is.</s>⟧[INST] And ice? [/INST]⟦ Ice is solid.</s>⟧"
    ]

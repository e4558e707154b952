"""What is supervised of a conversation, and how its turns become samples."""

from datetime import date

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts import template as template_module
from lightning_dataflow.prompts.encoding import Encoder
from lightning_dataflow.prompts.template import ChatTemplate
from tests.unit.prompts.tiny import ASK, ICE, MISTRAL, NO_PROMPT, PLAIN, TAGGED, THINK, byte_tokenizer, chat, show

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WEATHER = {"role": "user", "content": "Weather in Oslo?"}
BARS = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")


def im_turns(*pairs: tuple[str, str]) -> str:
    """The rendering of (question, marked answer) in ChatML."""
    return "".join(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}\n" for q, a in pairs)


def test_one_sample_teaches_all_turns(im):
    expected = im_turns(("Is water wet?", "⟦Yes, it is.<|im_end|>⟧"), ("And ice?", "⟦Ice is solid.<|im_end|>⟧"))
    assert show(im, ICE) == [expected]
    assert show(im, ICE, TAGGED) == [expected]


def test_all_and_last_make_a_sample_of_each_turn(im):
    first = im_turns(("Is water wet?", "⟦Yes, it is.<|im_end|>⟧")).rstrip()
    last = im_turns(("Is water wet?", "Yes, it is.<|im_end|>"), ("And ice?", "⟦Ice is solid.<|im_end|>⟧")).rstrip()
    assert show(im, ICE, turns="all") == [first, last]
    assert show(im, ICE, turns="last") == [last]
    with pytest.raises(UserError, match=r"data.turns=first is unknown: use one of auto, all, last"):
        Encoder(ChatTemplate(im), "first")


def test_a_last_turn_unlike_the_same_turn_in_the_middle_splits_the_conversation(im):
    none = "<think>\n\n</think>\n\n"
    assert show(im, ICE, THINK) == [
        im_turns(("Is water wet?", f"⟦{none}Yes, it is.<|im_end|>⟧")).rstrip(),
        im_turns(("Is water wet?", "Yes, it is.<|im_end|>"), ("And ice?", f"⟦{none}Ice is solid.<|im_end|>⟧")).rstrip(),
    ]


def test_earlier_thoughts_that_are_dropped_are_learnt_as_they_were_served(im):
    dropping = PLAIN.replace(
        "{{ m.content }}", "{% if loop.last and m.thinking %}<t>{{ m.thinking }}</t>{% endif %}{{ m.content }}"
    )
    record = chat("q", "a", "r", "b")
    record["messages"][1]["reasoning"], record["messages"][3]["reasoning"] = "First.", "Second."
    assert show(im, record, dropping) == [
        im_turns(("q", "⟦<t>First.</t>a<|im_end|>⟧")).rstrip(),
        im_turns(("q", "a<|im_end|>"), ("r", "⟦<t>Second.</t>b<|im_end|>⟧")).rstrip(),
    ]


@pytest.mark.parametrize("end", ["<|end|>", "<|eot_id|>", "<end_of_turn>"])
def test_the_end_token_is_learnt_in_every_turn_though_nothing_names_it(end):
    template = (
        f"{{% for m in messages %}}<|{{{{ m.role }}}}|>{{{{ m.content }}}}{end}{{% endfor %}}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer = byte_tokenizer(template, ("<|user|>", "<|assistant|>", end, "<|endoftext|>"))
    assert show(tokenizer, ICE) == [
        f"<|user|>Is water wet?{end}<|assistant|>⟦Yes, it is.{end}⟧"
        f"<|user|>And ice?{end}<|assistant|>⟦Ice is solid.{end}⟧<|endoftext|>"
    ]


def test_an_end_token_that_is_added_but_not_special():
    tokenizer = byte_tokenizer(PLAIN.replace("<|im_end|>", "<eot>"), ("<|im_start|>", "</s>"))
    tokenizer.add_tokens(["<eot>"])
    assert show(tokenizer, chat("q", "a")) == ["<|im_start|>user\nq<eot>\n<|im_start|>assistant\n⟦a<eot>⟧\n"]


def test_an_end_token_that_the_last_message_lacks():
    ending = PLAIN.replace("<|im_end|>\n", "{% if m.role == 'user' or not loop.last %}<|im_end|>\n{% endif %}")
    tokenizer = byte_tokenizer(ending)
    assert show(tokenizer, chat("q", "a", "r", "b")) == [im_turns(("q", "⟦a<|im_end|>⟧"), ("r", "⟦b<|im_end|>⟧")).rstrip()]


@pytest.mark.parametrize("space", ["\n", "\n\n", " "])
def test_white_space_after_the_end_token_is_not_learnt(space):
    turn = f"<start_of_turn>{{{{ m.role }}}}\n{{{{ m.content }}}}<end_of_turn>{space}"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}" + ASK.replace("<|im_start|>", "<start_of_turn>")
    tokenizer = byte_tokenizer(template, ("<start_of_turn>", "<end_of_turn>", "<eos>"))
    assert show(tokenizer, chat("q", "a")) == [
        f"<start_of_turn>user\nq<end_of_turn>{space}<start_of_turn>assistant\n⟦a<end_of_turn>⟧{space}"
    ]


def test_white_space_of_the_answer_is_learnt(im):
    assert show(im, chat("q", "  a \n")) == [im_turns(("q", "⟦  a \n<|im_end|>⟧"))]
    trimming = PLAIN.replace("m.content", "m.content | trim")
    assert show(im, chat("q", "  a \n"), trimming) == [im_turns(("q", "⟦a<|im_end|>⟧"))]


def test_the_header_is_not_learnt_where_the_template_has_no_generation_prompt(im):
    assert show(im, ICE, NO_PROMPT) == show(im, ICE)
    assert show(im, chat("q", "bcd"), NO_PROMPT) == [im_turns(("q", "⟦bcd<|im_end|>⟧"))]
    words = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    assert show(im, chat("q", "a"), words) == ["USER: q<|im_end|>ASSISTANT: ⟦a<|im_end|>⟧"]
    llama = "{% for m in messages %}[{{ m.role }}]\n\n{{ m.content }}<|im_end|>{% endfor %}"
    assert show(im, chat("q", "  a"), llama) == ["[user]\n\nq<|im_end|>[assistant]\n\n⟦  a<|im_end|>⟧"]


def test_the_question_itself_may_end_with_what_asks_for_an_answer():
    tokenizer = byte_tokenizer(MISTRAL, ("<s>", "</s>"), bos_token="<s>")
    assert show(tokenizer, chat("q", "a", "r", "b")) == ["<s>[INST] q [/INST]⟦ a</s>⟧[INST] r [/INST]⟦ b</s>⟧"]


def test_a_generation_prompt_that_is_no_prefix_of_the_finished_turn(im):
    opening = PLAIN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert show(im, chat("q", "a", "r", "<p>"), opening) == [im_turns(("q", "⟦a<|im_end|>⟧"), ("r", "⟦<p><|im_end|>⟧"))]
    assert show(im, chat("q", "<think>\nHm.</think>a"), opening) == [im_turns(("q", "<think>\n⟦Hm.</think>a<|im_end|>⟧"))]


def test_a_template_that_renders_the_question_differently_once_it_is_answered(im):
    counting = "{{ messages | length }}" + PLAIN
    assert show(im, chat("q", "a"), counting) == [
        "left out: the chat template renders earlier messages differently once the turn is finished"
    ]
    expected = [
        im_turns(("q", "a<|im_end|>"), ("r", "⟦b<|im_end|>⟧")),
        "message 1: the chat template renders earlier messages differently once the turn is finished",
    ]
    assert show(im, chat("q", "a", "r", "b"), "{{ '' if messages | length != 2 else '!' }}" + PLAIN) == expected


def test_turns_that_have_nothing_to_learn_are_named(im):
    expected = [im_turns(("q", "<|im_end|>"), ("r", "⟦b<|im_end|>⟧")), "message 1: the turn is empty"]
    assert show(im, chat("q", "", "r", "b")) == expected
    record = chat("q", "a", "r", "b")
    record["messages"][1]["weight"] = 0
    expected = [
        im_turns(("q", "a<|im_end|>"), ("r", "⟦b<|im_end|>⟧")),
        "message 1: the record excludes this turn from training",
    ]
    assert show(im, record) == expected
    assert show(im, {"messages": [WEATHER]}) == ["left out: no assistant turn"]


def test_a_conversation_that_begins_with_an_answer_teaches_the_others(im):
    first = {"role": "assistant", "content": "Hello!"}
    expected = ["<|im_start|>assistant\nHello!<|im_end|>\n" + im_turns(("q", "⟦a<|im_end|>⟧"))]
    why = "the conversation begins with it, so it answers nothing"
    assert show(im, {"messages": [first, *chat("q", "a")["messages"]]}) == [*expected, f"message 0: {why}"]
    assert show(im, {"messages": [first]})[0] == f"left out: {why}"


@pytest.mark.parametrize(
    ("record", "template", "what"),
    [
        ({**chat("q", "a"), "tools": [CALL["function"]]}, PLAIN, "tools"),
        ({**chat("q", "a"), "documents": [{"text": "d"}]}, PLAIN, "documents"),
        (
            {**chat("q", "a"), "system": "s"},
            PLAIN.replace("in messages", "in messages if m.role != 'system'"),
            "message of role system",
        ),
        ({"messages": [WEATHER, {"role": "assistant", "content": "Look.", "tool_calls": [CALL]}]}, PLAIN, "tool calls"),
        ({"messages": [WEATHER, {"role": "assistant", "content": "a", "thinking": "Hm."}]}, PLAIN, "turn's reasoning"),
        (
            chat("q", "<think>Hm.</think>a"),
            PLAIN.replace("m.content", "m.content.split('</think>')[-1]"),
            "turn's reasoning",
        ),
        (
            chat("q", "[THINK]Hm.[/THINK]a"),
            PLAIN.replace("m.content", "m.content.split('[/THINK]')[-1]"),
            "turn's reasoning",
        ),
        (chat("q", "a"), PLAIN.replace("m.content", "m.content if m.role == 'assistant'"), "content of role user"),
        (chat("q", "a"), PLAIN.replace("m.content", "m.content if m.role == 'user'"), "content of role assistant"),
    ],
)
def test_what_the_template_drops_is_not_trained_without(im, record, template, what):
    assert show(im, record, template) == [f"left out: the chat template drops the {what}"]


@pytest.mark.parametrize("content", ["{{ m.content }}", "{{ m.content + '' }}"], ids=["writes None", "refuses null"])
def test_a_template_that_does_not_know_null_content_gets_empty_text(im, content):
    call = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
    record = {"messages": [WEATHER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    turns = im_turns(("Weather in Oslo?", "⟦<call>weather</call><|im_end|>⟧"))
    assert show(im, record, PLAIN.replace("{{ m.content }}", content + call)) == [turns]


def test_a_tool_call_without_text_is_learnt(im):
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    record = {"messages": [WEATHER, call, {"role": "tool", "content": "3 C"}, {"role": "assistant", "content": "3 C."}]}
    called = '<call>weather {"city": "Oslo"}</call><|im_end|>'
    start = "<|im_start|>user\nWeather in Oslo?<|im_end|>\n<|im_start|>assistant\n"
    assert show(im, record, THINK) == [
        f"{start}⟦<think>\n\n</think>\n\n\n{called}⟧".replace("\n\n\n<call>", "\n\n<call>"),
        f"{start}{called}\n<|im_start|>tool\n3 C<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n3 C.<|im_end|>⟧",
    ]


def test_a_template_that_asks_whether_content_is_null(im):
    asking = PLAIN.replace(
        "{{ m.content }}",
        "{% if m['content'] is none %}{% for c in m.tool_calls %}<call>{{ c.function.name }}</call>{% endfor %}"
        "{% else %}{{ m['content'] + '' }}{% endif %}",
    )
    record = {"messages": [WEATHER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    assert show(im, record, asking) == [im_turns(("Weather in Oslo?", "⟦<call>weather</call><|im_end|>⟧"))]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
    ],
)
def test_a_template_that_refuses_the_messages(im, template, reason):
    assert show(im, chat("q", "a"), template) == [f"left out: refused by the chat template ({reason})"]


def test_a_template_that_is_not_valid_is_nobodys_record(im):
    with pytest.raises(UserError, match=r"the chat template is not valid Jinja \(.*, line 1\): correct it"):
        show(im, chat("q", "a"), "{% for %}")


def test_rendering_that_takes_too_long(im, monkeypatch):
    monkeypatch.setattr(template_module, "RENDER_TIMEOUT_S", 0.02)
    slow = PLAIN + "{% for i in range(9999 if messages[2:] else 0) %}{% for i in range(9999) %}{% endfor %}{% endfor %}"
    assert show(im, ICE, slow) == ["left out: rendering takes longer than 0.02 s"]


def test_the_date_is_the_runs_own(im):
    record = {**chat("q", "a")}
    dated = "{{ strftime_now('%d %b %Y') }}" + PLAIN
    assert show(im, record, dated, today=date(2024, 7, 26)) == ["26 Jul 2024" + im_turns(("q", "⟦a<|im_end|>⟧"))]
    assert [ChatTemplate(im, text).writes_date for text in (dated, PLAIN)] == [True, False]


def test_arguments_reach_every_rendering_and_the_records_own_come_first(im):
    thinking = PLAIN.replace("{% if add", "{% if enable_thinking %}!{% endif %}{% if add")
    plain = im_turns(("q", "⟦a<|im_end|>⟧"))
    assert show(im, chat("q", "a"), thinking) == [plain]
    assert show(im, chat("q", "a"), thinking, template_args={"enable_thinking": True}) != [plain]
    own = {**chat("q", "a"), "chat_template_kwargs": {"enable_thinking": False}}
    assert show(im, own, thinking, template_args={"enable_thinking": True}) == [plain]


@pytest.mark.parametrize("arguments", ["foo", True, False, ["enable_thinking"]])
def test_arguments_that_are_no_variables(im, arguments):
    with pytest.raises(UserError, match=r"data\.template_args=.*: give variables of the template, such as \{enable_think"):
        ChatTemplate(im, template_args=arguments)


def test_a_misspelt_argument_of_the_template_is_refused(im):
    template = "{% if enable_thinking %}a{% endif %}" + PLAIN
    message = r"data\.template_args: the chat template has no variable enable_thinkin: correct the name or remove it"
    with pytest.raises(UserError, match=message):
        ChatTemplate(im, template, template_args={"enable_thinkin": False})
    ChatTemplate(im, template, template_args={"enable_thinking": False})


def test_a_template_of_its_own_for_tools(im):
    tokenizer = byte_tokenizer({"default": PLAIN, "tool_use": "{{ tools[0].function.name }}:" + PLAIN})
    plain = im_turns(("q", "⟦a<|im_end|>⟧"))
    assert show(tokenizer, chat("q", "a")) == [plain]
    assert show(tokenizer, {**chat("q", "a"), "tools": [{"name": "weather"}]}) == [f"weather:{plain}"]
    tokenizer.chat_template = {"one": PLAIN, "two": PLAIN}
    with pytest.raises(UserError, match=r"has no chat template: set data\.chat_template"):
        show(tokenizer, chat("q", "a"))

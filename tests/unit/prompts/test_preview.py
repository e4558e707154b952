"""What `show-mask` prints and writes of a record."""

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.encoding import Encoder
from lightning_dataflow.prompts.preview import preview_record
from lightning_dataflow.prompts.sources import Record
from lightning_dataflow.prompts.template import ChatTemplate
from tests.unit.prompts.tiny import PLAIN, THINK, byte_tokenizer, chat

TWO = chat("q", "a", "r", "b")
SILENT = chat("q", "", "r", "b")
START = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
NEXT = "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"


def preview(tokenizer, data, template=None, turns="auto"):
    return preview_record(Encoder(ChatTemplate(tokenizer, template), turns), Record("data.jsonl, line 7", data))


def rows(tokenizer, data, template=None, turns="auto") -> list[dict]:
    return list(preview(tokenizer, data, template, turns).as_json())


def row(turn, num_tokens=0, spans=(), reason=None) -> dict:
    return {"line": "data.jsonl, line 7", "turn": turn, "num_tokens": num_tokens, "spans": [*spans], "reason": reason}


def test_supervised_text_is_between_brackets_or_on_green(im):
    shown = preview(im, TWO)
    head = "data.jsonl, line 7: 46 tokens, 4 supervised\n"
    assert shown.as_text(im, colour=False) == f"{head}{START}⟦a<|im_end|>⟧\n{NEXT}⟦b<|im_end|>⟧\n"
    green, plain = "\x1b[30;42m", "\x1b[0m"
    assert shown.as_text(im) == f"{head}{START}{green}a<|im_end|>{plain}\n{NEXT}{green}b<|im_end|>{plain}\n"


def test_turns_that_are_samples_of_their_own_are_named(im):
    none = "<think>\n\n</think>\n\n"
    assert preview(im, TWO, THINK).as_text(im, colour=False) == (
        f"data.jsonl, line 7, message 2: 41 tokens, 21 supervised\n{START}⟦{none}a<|im_end|>⟧\n\n"
        f"data.jsonl, line 7, message 4: 64 tokens, 21 supervised\n{START}a<|im_end|>\n{NEXT}⟦{none}b<|im_end|>⟧"
    )
    assert rows(im, TWO, THINK) == [row(1, 41, [[20, 41]]), row(3, 64, [[43, 64]])]
    assert rows(im, TWO, turns="last") == [row(3, 45, [[43, 45]])]


def test_turns_that_are_not_supervised_have_a_reason(im):
    assert preview(im, SILENT).as_text(im, colour=False) == (
        f"data.jsonl, line 7: 45 tokens, 2 supervised\n{START}<|im_end|>\n{NEXT}⟦b<|im_end|>⟧\n\n\n"
        "data.jsonl, line 7, message 2: not supervised: the turn is empty"
    )
    assert rows(im, SILENT) == [row(3, 45, [[42, 44]]), row(1, reason="the turn is empty")]


def test_all_turns_of_one_sample(im):
    assert rows(im, TWO) == [row(1, 46, [[20, 22]]), row(3, 46, [[43, 45]])]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (chat("q"), "no assistant turn"),
        (UserError("data.jsonl, line 7: not JSON"), "not JSON"),
        ({"input_ids": [1, -1]}, "input_ids[1] is -1: token ids are integers from 0 to 2147483647"),
    ],
)
def test_records_that_are_left_out_have_a_reason(im, data, reason):
    assert preview(im, data).as_text(im) == f"data.jsonl, line 7: left out: {reason}"
    assert rows(im, data) == [row(None, reason=reason)]


def test_token_ids_have_no_turns(im):
    assert rows(im, {"input_ids": [65, 66, 67], "loss_mask": [0, 1, 1]}) == [row(None, 3, [[1, 3]])]


def test_control_characters_reach_no_terminal(im):
    shown = preview(im, chat("q", "\x1b[2J\r\ta\x07")).as_text(im, colour=False)
    assert shown.splitlines()[-1] == "⟦\\x1b[2J\\x0d\ta\\x07<|im_end|>⟧"
    assert "\x1b" not in preview(im, chat("\x1b[2J", "a"), "{{ raise_exception(messages[0].content) }}").as_text(im)
    refuses_the_last = (
        f"{{% if messages | length == 4 %}}{{{{ raise_exception(messages[-1].content) }}}}{{% endif %}}{PLAIN}"
    )
    refused = preview(im, chat("q", "a", "r", "\x1b[2J"), refuses_the_last, "all").as_text(im, colour=False)
    assert refused.splitlines()[-1].startswith("data.jsonl, line 7, message 4: not supervised: ")
    assert "\\x1b[2J" in refused and "\x1b" not in refused


def test_an_answer_within_a_token_of_the_question(im):
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", merges=[("q", "a")])
    data = chat("q", "a", "r", "b")
    assert rows(tokenizer, data) == [row(1, 3, reason="nothing supervised"), row(3, 3, [[2, 3]])]
    assert rows(im, {"input_ids": [1, 2], "loss_mask": [0, 0]}) == [row(None, 2, reason="nothing supervised")]


def test_a_template_that_is_not_valid_is_nobodys_record(im):
    with pytest.raises(UserError, match="not valid Jinja"):
        preview(im, TWO, "{% for %}")

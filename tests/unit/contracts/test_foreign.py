"""Text from outside, in messages and as JSON."""

import pickle

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import first_line, one_line, parse_json, printable, read_bounded, without_advice


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain äöü 漢字 👩‍👩‍👧 a\u00a0b", "plain äöü 漢字 👩‍👩‍👧 a\u00a0b"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\rb\x9b1m", r"a\x0db\x9b1m"),
        ("two\nlines\t.", "two\nlines\t."),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_a_terminal_would_act_on_is_escaped(text, shown):
    assert printable(text) == shown
    printable(text).encode()


def test_one_line_is_bounded():
    assert one_line("a\n b\tc") == "a b c"
    assert one_line("x" * 1000) == "x" * 299 + "…"


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("x contains custom code.\nPlease pass `trust_remote_code=True`.", "x contains custom code."),
        ("x has code. Set the option trust_remote_code=True to remove this error.", "x has code."),
        (
            "Weights only load failed. In PyTorch 2.6 the default of `weights_only` changed; set weights_only=False. Bad.",
            "Weights only load failed. Bad.",
        ),
        ("Cannot load; pass --trust-remote-code to allow it", "Cannot load;"),
        ("Object arrays cannot be loaded when allow_pickle=False", "UnpicklingError"),
        ("", "UnpicklingError"),
    ],
)
def test_advice_to_load_unsafely_is_not_passed_on(message, kept):
    assert first_line(pickle.UnpicklingError(message)) == kept
    assert "trust" not in without_advice(message).lower()


def test_real_advice_of_torch(tmp_path):
    import torch

    torch.save({"a": _Own()}, tmp_path / "x")
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(tmp_path / "x", weights_only=True)
    assert "trust the source" in str(caught.value)
    assert first_line(caught.value) == "Weights only load failed."


class _Own:
    """Something that torch does not unpickle."""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'"\xff"', "not valid JSON"),
        ("[" + "1," * 100 + "1]", "has 203 bytes, the limit is 100"),
    ],
    ids=range(6),
)
def test_json_is_bounded(text, reason):
    with pytest.raises(UserError, match=f"the card of x .*{reason}"):
        parse_json(text, "the card of x", 100 if "limit" in reason else 1 << 24)


@pytest.mark.parametrize(("size", "read"), [(99, 99), (100, 100), (101, 101), (5000, 101)])
def test_a_file_is_read_up_to_one_byte_more_than_the_limit(tmp_path, size, read):
    """By that byte parse_json refuses it."""
    (tmp_path / "x").write_bytes(b"x" * size)
    assert len(read_bounded(tmp_path / "x", 100)) == read

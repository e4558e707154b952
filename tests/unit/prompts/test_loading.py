"""What of the records is trained on and held out, what is counted."""

import logging

import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts import loading
from lightning_dataflow.prompts.encoding import Encoder
from lightning_dataflow.prompts.preview import preview_record
from lightning_dataflow.prompts.sources import Record
from lightning_dataflow.prompts.template import ChatTemplate
from tests.unit.prompts.tiny import ICE, IDS, PLAIN, THINK, byte_tokenizer, chat, load, mark


def first_ids(prompts) -> list[int]:
    return [prompt.input_ids[0] for prompt in prompts]


def numbered(count: int, start: int = 0) -> list[dict]:
    return [{"input_ids": [start + index, 1, 2]} for index in range(count)]


def test_prompts_are_named_by_record_and_by_turn_where_turns_are_split(im, write):
    path = write(ICE, IDS)
    prompts, _ = load(path, im, chat_template=THINK)
    assert [prompt.source_id for prompt in prompts] == ["00000001-t1", "00000001-t3", "00000002"]
    assert (len(prompts), prompts.num_records) == (3, 2)
    assert [prompt.source_id for prompt in load(path, im)[0]] == ["00000001", "00000002"]
    assert [prompt.source_id for prompt in load(path, im, turns="last")[0]] == ["00000001-t3", "00000002"]


def test_what_is_trained_on(im, write):
    (prompt,), _ = load(write(chat("q", "a")), im)
    expected = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
    assert mark(im, prompt.input_ids, prompt.loss_mask) == expected
    assert im.decode(prompt.question) == expected.split("⟦")[0]
    (text,), _ = load(write({"text": "blue"}), im)
    assert (text.loss_mask, im.decode(text.question)) == ((1, 1, 1, 1), "bl")


def test_what_is_left_out_is_counted(im, write):
    long_question = {"instruction": "x" * 300, "output": "a"}
    answer_first = {"messages": ICE["messages"][1:]}
    nothing = {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]}
    early = {"input_ids": [1, 2, 3], "loss_mask": [1, 1, 0]}  # nothing predicts the first two tokens
    path = write(ICE, long_question, chat("q"), answer_first, nothing, early, chat("q", "", "r", "b"), {"text": "y" * 500})
    training, held_out = load(path, im)
    assert [len(prompt.input_ids) for prompt in training] == [87, 66, 45, 200]
    assert not held_out
    assert training.skipped == {
        "nothing supervised within max_length": 2,
        "no assistant turn": 1,
        "nothing supervised": 1,
        "turn: the conversation begins with it, so it answers nothing": 1,
        "turn: the turn is empty": 1,
    }


def test_nothing_of_a_held_out_conversation_is_trained_on(im, write):
    path = write(ICE, ICE, IDS)
    training, held_out = load(path, im, turns="all", num_eval_samples=3)
    assert [prompt.source_id for prompt in held_out] == ["00000001-t1", "00000001-t3", "00000002-t1"]
    assert [prompt.source_id for prompt in training] == ["00000003"]
    assert training.skipped == {"a turn of a held-out conversation": 1}


def test_the_first_samples_after_those_held_out(im, write):
    path = write(*numbered(9), "{broken")
    few, held_out = load(path, im, num_eval_samples=2, num_samples=3)
    assert (first_ids(held_out), first_ids(few)) == ([0, 1], [2, 3, 4])
    everything, same = load(path, im, num_eval_samples=2, max_broken=1)
    assert (first_ids(same), first_ids(everything)) == ([0, 1], [2, 3, 4, 5, 6, 7, 8])


def test_several_sources_in_proportion_to_their_weights(im, write, caplog):
    paths = [write(*numbered(2), name="few.jsonl"), write(*numbered(9, 10), name="many.jsonl")]
    assert first_ids(load(paths, im)[0]) == [0, 1, *range(10, 19)]
    with caplog.at_level(logging.INFO):
        assert first_ids(load(paths, im, weights=[1, 3])[0]) == [10, 11, 0, 12, 13, 14, 1, 15, 16, 17]
    assert f"few.jsonl has no more records, so no more are read: 2 from {paths[0]}, 8 from {paths[1]}" in caplog.text
    for weights in ([1], [1, 0]):
        with pytest.raises(UserError, match=r"data.weights=\[.*\]: give a number above 0 for each of the 2 paths"):
            load(paths, im, weights=weights)


def test_broken_records_are_named_and_left_out_up_to_a_number(im, write, caplog):
    path = write(IDS, "{broken", {"input_ids": [1, -100, 4]}, IDS)
    prompts, _ = load(path, im, max_broken=2)
    assert [prompt.source_id for prompt in prompts] == ["00000001", "00000004"]
    assert prompts.skipped == {"broken": 2}
    assert f"left out a broken record: {path}, line 3: input_ids[1] is -100: token ids are integers" in caplog.text
    with pytest.raises(UserError, match=r"line 2: not JSON .*, correct or remove the line$"):
        load(path, im)
    with pytest.raises(UserError, match=r"line 3: .* \(2 broken records, data.max_broken=1\)$"):
        load(path, im, max_broken=1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"input_ids": [1, 2, 258]},
            "input_ids has 258, and the ids of the tokenizer end at 257: give ids of the",
        ),
        (
            {"messages": [{"role": "usr", "content": "q"}, ICE["messages"][1]]},
            "message 1: the role 'usr' is unknown and the chat template does not name it: use system, user, assistant",
        ),
    ],
)
def test_what_the_tokenizer_or_its_template_does_not_know_is_a_broken_record(im, write, caplog, record, message):
    path = write(IDS, record)
    prompts, _ = load(path, im, max_broken=1)
    assert [prompt.source_id for prompt in prompts] == ["00000001"]
    assert f"left out a broken record: {path}, line 2: {message}" in caplog.text
    with pytest.raises(UserError, match=f"line 2: {message}"):
        load(path, im)
    preview = preview_record(Encoder(ChatTemplate(im)), Record("here", record))
    assert (preview.reason or "").startswith(message)


def test_roles_that_are_usual_or_named_by_the_template(im, write):
    usual = {"messages": [{"role": "developer", "content": "q"}, {"role": "observation", "content": "r"}, *ICE["messages"]]}
    assert len(load(write(usual), im)[0]) == 1
    own = {"messages": [{"role": "critic", "content": "q"}, *ICE["messages"]]}
    named = PLAIN.replace("{{ m.role }}", "{{ 'reviewer' if m.role == 'critic' else m.role }}", 1)
    assert len(load(write(own), im, chat_template=named)[0]) == 1


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([IDS], {"format": "csv"}, "data.format=csv is unknown: use one of auto, tokens, sharegpt"),
        ([IDS], {"max_length": 2}, "data.max_length=2 leaves nothing to learn: use at least 3"),
        ([IDS], {"turns": "some"}, "data.turns=some is unknown"),
        (
            [IDS],
            {"num_eval_samples": 1},
            r"no prompts left .* \(1 held out; left out: none\): set data\.num_eval_samples",
        ),
        ([], {}, r"no prompts left to train on in .*: the file is empty, check data\.path"),
        ([chat("q")], {}, r"no prompts left .* \(0 held out; left out: 1 no assistant turn\): check data.path"),
        ([ICE], {"chat_template": "{% for %}"}, "the chat template is not valid Jinja"),
    ],
)
def test_runs_without_a_prompt_end_in_one_line(im, write, lines, options, message):
    with pytest.raises(UserError, match=message) as raised:
        load(write(*lines), im, **options)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_without_a_chat_template(write):
    tokenizer = byte_tokenizer(None)
    with pytest.raises(UserError, match=r"has no chat template: set data\.chat_template to a Jinja file"):
        load(write(ICE), tokenizer)
    assert len(load(write(IDS, {"text": "one"}), tokenizer)[0]) == 2


def test_token_counts(im, write, monkeypatch):
    prompts, _ = load(write({"input_ids": [5, 6, 7, 7], "loss_mask": [0, 1, 1, 1]}, {"input_ids": [6, 6, 1]}), im)
    for at_a_time in (1 << 24, 3):
        monkeypatch.setattr("lightning_dataflow.prompts.dataset.COUNTED_AT_A_TIME", at_a_time)
        assert prompts.token_counts(10).tolist() == [0, 1, 0, 0, 0, 0, 3, 2, 0, 0]


def test_prompts_that_the_target_cannot_read(im, write):
    prompts, _ = load(write(IDS, {"input_ids": [5, 250, 6, 7, 8]}), im)
    prompts.check_target(251, 5)
    with pytest.raises(UserError, match="record 00000002 has token id 250, the target's vocabulary has 200: use the"):
        prompts.check_target(200, 100)
    with pytest.raises(
        UserError, match=r"record 00000002 has 5 tokens, the target reads 4: set data\.max_length to at most 4"
    ):
        prompts.check_target(251, 4)


def test_the_version_tells_prompts_apart(im, write):
    path, other = write(ICE, IDS, IDS), write(IDS, ICE, IDS, name="other.jsonl")

    def version(path=path, **options) -> str:
        return load(path, im, **options)[0].version

    masked = write(ICE, IDS, {**IDS, "loss_mask": [0, 1, 1, 1]}, name="masked.jsonl")
    different = {"max_length": 80}, {"num_eval_samples": 1}, {"num_samples": 2}, {"turns": "all"}, {"chat_template": THINK}
    versions = [version(), version(other), version(masked), *(version(**options) for options in different)]
    assert len({*versions}) == len(versions)
    assert version() == version()


def test_samples_are_a_sequence(im, write):
    prompts, _ = load(write(*numbered(4)), im)
    assert (first_ids(prompts[1:3]), prompts[-1].input_ids) == ([1, 2], (3, 1, 2))
    assert (prompts.lengths.tolist(), prompts.bounds.tolist()) == ([3] * 4, [0, 3, 6, 9, 12])
    with pytest.raises(IndexError, match="prompt 4 of 4"):
        prompts[4]


def test_progress_is_reported(im, write, monkeypatch, caplog):
    monkeypatch.setattr(loading, "REPORT_EVERY_S", 0)
    with caplog.at_level(logging.INFO):
        load(write(IDS, IDS), im)
    assert "tokenised 2 records: 2 samples, 8 tokens" in caplog.text


def test_without_a_cache_no_files_are_left(im, write, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    prompts, _ = load(write(IDS), im)
    assert not list((tmp_path / "tmp").iterdir())
    assert prompts[0].input_ids == (5, 6, 7, 8)

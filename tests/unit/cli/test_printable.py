"""What others wrote does not reach a terminal as it is."""

import io
import json
import logging

from lightning_dataflow.cli import capture, show_mask
from lightning_dataflow.cli.printable_log import log_printable


def test_logs_are_printable(monkeypatch):
    root, output = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
    monkeypatch.setattr(root, "handlers", [handler])
    log_printable()
    log_printable()
    root.error("skip: \x1b]0;owned\x07 %s", "\x9b2J")
    assert output.getvalue() == "[ERROR] skip: \\x1b]0;owned\\x07 \\x9b2J\n"


def test_why_records_are_left_out_is_printable(run, tmp_path, capsys):
    """Templates quote what records hold."""
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}{% if '2J' in m.content %}{{ raise_exception(m.content) }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    records = [{"instruction": question, "output": "a"} for question in ("q", "r", "s", "\x1b[2J")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    chosen = ("data.path=prompts.jsonl", "data.chat_template=template.jinja", "data.num_eval_samples=1")
    for command, options in (
        (show_mask.main, ("show_mask.colour=false",)),
        (capture.main, ("store=shared_dir", "store.root=features")),
    ):
        assert run(command, "data.prepare=null", *chosen, *options) == 0
        shown = capsys.readouterr().out
        assert "left out: 1 refused by the chat template (\\x1b[2J)" in shown
        assert "\x1b" not in shown

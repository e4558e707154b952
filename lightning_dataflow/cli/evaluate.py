"""The `evaluate` command: acceptance and speed-up of drafts, decoded by this package, vLLM or an SGLang server."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from lightning_dataflow.checkpoints.markers import has_marker, incomplete
from lightning_dataflow.cli.hydra_command import command
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import UserError

if TYPE_CHECKING:
    from lightning_dataflow.run.builder import Builder

SHARES, WIDTH = "acceptance_per_position", 28
JSON = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One draft to measure.

    Attributes:
        name: for the table.
    """

    name: str
    path: Path

    @property
    def step(self) -> int | None:
        """Of its training, if its path tells."""
        match = re.search(r"step[-=](\d+)", self.path.name)
        return int(match[1]) if match else None


def evaluate(config: TrainConfig) -> None:
    """Decode prompts with every draft, print a table, and write JSON and a figure if asked to.

    If a draft fails, the table and the JSON hold what was measured before.
    """
    from lightning_dataflow.cli.figure import draw_measurements
    from lightning_dataflow.cli.judges import JUDGES
    from lightning_dataflow.evaluation.acceptance import Decoding
    from lightning_dataflow.run.builder import Builder

    options = config.evaluate
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=config.seed,
        batch_size=options.batch_size,
    )
    drafts = find_drafts(config)
    output = None if options.output is None else _output_file(options.output)
    parts = Builder(config)
    measurements: list[dict[str, Any]] = []
    try:
        with parts.resources:
            judge = JUDGES[options.backend](parts, decoding)
            prompts = _read_prompts(parts, judge.room)
            used = asdict(options) | {"seed": config.seed}
            used = {name: value for name, value in used.items() if name not in ("every_n_steps", *judge.unused)}
            for number, draft in enumerate(drafts, start=1):
                report = judge.measure(draft.path, prompts)
                measurements.append({"name": draft.name, "step": draft.step, **report.to_json()})
                if output is not None:
                    content = {"measurements": measurements, "settings": used}
                    output.write_bytes(orjson.dumps(content, option=JSON))
                if len(drafts) > 1:
                    length = f"acceptance length {report.acceptance_length:.3f}"
                    print(f"{draft.name}: {length}, {number} of {len(drafts)} drafts", flush=True)
    finally:
        if measurements:
            print(table(measurements), flush=True)
    if output is not None:
        draw_measurements(measurements, output.with_suffix(".png"))


def find_drafts(config: TrainConfig) -> list[Draft]:
    """The draft that `evaluate.checkpoint` names, or those of a run, by step. Raises UserError if there is none."""
    options = config.evaluate
    if options.backend == "sglang_server":
        if options.checkpoint is not None:
            raise UserError(
                "evaluate.checkpoint with backend sglang_server: the server was started with its draft, leave it out"
            )
        return [Draft(name=str(options.url), path=Path())]
    if options.checkpoint is None:
        raise UserError(
            "evaluate needs a draft: set evaluate.checkpoint to a checkpoint, a run's folder, or an exported folder"
        )
    path = Path(options.checkpoint)
    if (path / "checkpoints").is_dir():
        return _drafts_of_run(path / "checkpoints")
    if not path.exists():
        raise UserError(f"evaluate.checkpoint={path} does not exist: give a checkpoint, a run's folder, or an exported one")
    name = Path(os.path.abspath(path)).name.removesuffix(".ckpt")  # `.` has no name of its own
    return [Draft(name=name, path=path)]


def _drafts_of_run(folder: Path) -> list[Draft]:
    complete = sorted(path for path in folder.glob("*.ckpt") if has_marker(path) and incomplete(path) is None)
    if not complete:
        raise UserError(f"no complete checkpoint in {folder}: name one by its own path")
    drafts = [Draft(name=path.stem, path=path) for path in complete]
    by_step = {draft.step or draft.name: draft for draft in drafts}  # the best one may be there twice
    return sorted(by_step.values(), key=lambda draft: (draft.step or 0, draft.name))


def table(measurements: Sequence[dict[str, Any]]) -> str:
    """One line per quantity, one column per draft."""
    rows: dict[str, list[str]] = {}
    for name in measurements[0]:
        if name in (SHARES, "accepted_per_position"):
            for position in range(len(measurements[0][name])):
                label = f"{'accepted' if name == SHARES else 'num_accepted'}_{position + 1}"
                rows[label] = [_shown(each[name][position]) for each in measurements]
        elif any(each[name] is not None for each in measurements):
            rows[name] = [_shown(each[name]) for each in measurements]
    widths = [max(len(row[column]) for row in rows.values()) for column in range(len(measurements))]
    return "\n".join(
        f"{name:{WIDTH}}" + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for name, row in rows.items()
    )


def _output_file(name: str) -> Path:
    """`evaluate.output`. Raises UserError unless JSON, and a figure beside it, can be written there."""
    file = Path(name)
    if not name or file.is_dir():
        raise UserError(f"evaluate.output={name} is no name of a file: name a JSON file, such as {file / 'report.json'}")
    figure = file.with_suffix(".png")
    if file.suffix.lower() == figure.suffix:
        raise UserError(f"evaluate.output={name} is the figure's name: name the JSON file, {file.with_suffix('.json')}")
    if not file.absolute().parent.is_dir():
        raise UserError(f"evaluate.output={name}: there is no such folder, make it first")
    if figure.is_dir():
        raise UserError(f"evaluate.output={name}: {figure}, where its figure goes, is a folder: choose another name")
    return file


def _read_prompts(parts: "Builder", room: int) -> list[list[int]]:
    """Prompts of `evaluate.data`, otherwise the held-out ones.

    Raises UserError if one does not fit the target, with `room` for proposals.
    """
    from lightning_dataflow.prompts import load_questions
    from lightning_dataflow.targets import read_target_info

    config, options = parts.config, parts.config.evaluate
    if options.data is not None:
        prompts = load_questions(options.data, parts.tokenizer, num_prompts=options.num_prompts, **parts.rendering)
    else:
        prompts = [list(prompt.question) for prompt in parts.prompts[1]]
        if not prompts:
            raise UserError("no held-out prompts: set data.num_eval_samples, or evaluate.data to a file of prompts")
        if options.num_prompts is not None and options.num_prompts > len(prompts):
            raise UserError(
                f"evaluate.num_prompts={options.num_prompts}: {len(prompts)} prompts are held out "
                "(data.num_eval_samples), ask 1 up to that, or null for all"
            )
        prompts = prompts[: options.num_prompts]
    info = read_target_info(config.target.path)
    for number, prompt in enumerate(prompts, start=1):
        if unknown := [token for token in prompt if not 0 <= token < info.vocab_size]:
            raise UserError(f"prompt {number} has token id {unknown[0]}, the target's vocabulary has {info.vocab_size}")
        needed = len(prompt) + options.max_new_tokens + room
        if needed > info.max_position_embeddings:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens: with evaluate.max_new_tokens={options.max_new_tokens} and "
                f"{room} of proposals that is {needed}, and the target reads {info.max_position_embeddings}; generate fewer"
            )
    return prompts


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


main = command(evaluate, keeps_folder=False)

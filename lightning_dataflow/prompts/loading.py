"""Reads, tokenises and filters the prompts of a run."""

import hashlib
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.cache import PromptWriter, cached, read_arrays
from lightning_dataflow.prompts.dataset import NO_TURN, PromptDataset
from lightning_dataflow.prompts.encoding import Encoder
from lightning_dataflow.prompts.parallel import Outcome, encode_all
from lightning_dataflow.prompts.records import FORMATS
from lightning_dataflow.prompts.sources import Record, find_files, read_records
from lightning_dataflow.prompts.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MIN_LABEL_POSITION = 2
"""A draft sees token t+1 and predicts token t+2, so the first two tokens of a sample are never labels."""
CACHE_VERSION = 2
"""To be raised when the same records would give other tokens or masks."""
REPORT_EVERY_S = 10.0


def load_prompts(
    path: str | Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    format: str = "auto",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    weights: Sequence[float] | None = None,
    num_eval_samples: int = 0,
    num_samples: int | None = None,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    turns: str = "auto",
    today: date | None = None,
    end_ids: Sequence[int] = (),
    max_broken: int = 0,
    cache: str | Path | None = None,
    cache_timeout_s: float = 1800.0,
) -> tuple[PromptDataset, PromptDataset]:
    """Read, tokenise and filter prompts. Returns (training prompts, held-out prompts).

    A conversation gives one sample, or one for each of its turns, see prompts/turns.py. The first `num_eval_samples`
    samples are held out, and nothing of their conversations is trained on. The next `num_samples` (None: all) are.

    Args:
        path: files, folders, patterns or Hugging Face data sets, see `read_records`.
        split, config, revision: of a Hugging Face data set; `split` also of a JSON object with lists of records.
        weights: one for each path: records are taken in these proportions until one path has no more. None reads one path
            after the other.
        chat_template: Jinja text that replaces the tokenizer's own.
        template_args: for every rendering, for example `{"enable_thinking": False}`.
        turns: `auto`, `all` or `last`; see `to_samples`.
        today: the date that templates write; by default the current one.
        end_ids: token ids that end a turn, besides the tokenizer's.
        max_broken: up to this many broken records are left out with a warning; one more is an error.
        cache: folder for tokenised prompts, which all processes of a machine share. None keeps nothing.
        cache_timeout_s: for another process that tokenises the same prompts.

    Raises:
        UserError: missing or broken file, unknown format, no chat template, nothing left after filtering.
        PeerTimeoutError: another process that tokenises the prompts did not end in time.
    """
    if format not in FORMATS:
        raise UserError(f"data.format={format} is unknown: use one of {', '.join(FORMATS)}")
    if max_length <= MIN_LABEL_POSITION:
        raise UserError(f"data.max_length={max_length} leaves nothing to learn: use at least {MIN_LABEL_POSITION + 1}")
    paths = [path] if isinstance(path, str) else list(path)
    template = ChatTemplate(tokenizer, chat_template, template_args=template_args, today=today, end_ids=end_ids)
    encoder = Encoder(template, turns)
    source: dict[str, Any] = {"split": split, "config": config, "revision": revision}
    wanted = None if num_samples is None else num_eval_samples + num_samples

    def build(folder: Path) -> None:
        records = read_sources(paths, weights, **source)
        writer = PromptWriter(folder)
        facts = _write(writer, encode_all(records, encoder, format), max_length, wanted, num_eval_samples, max_broken)
        writer.finish(facts)

    if cache is None:
        with tempfile.TemporaryDirectory(prefix="prompts-") as folder:  # a mapped file may be deleted
            build(Path(folder))
            arrays, facts = read_arrays(Path(folder))
    else:
        of_code = {"format": format, "max_length": max_length, "wanted": wanted, "eval": num_eval_samples, "turns": turns}
        key = _key(
            [_source_key(name, split) for name in paths], source, weights, of_code, max_broken, _template_key(template)
        )
        arrays, facts = read_arrays(cached(Path(cache).expanduser() / key, build, cache_timeout_s))
    held_out, skipped = facts["num_held_out"], facts["skipped"]
    if held_out == len(arrays.samples):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none"
        if held_out:
            raise UserError(
                f"no prompts left to train on in {', '.join(paths)} ({held_out} held out; left out: {reasons}): "
                f"set data.num_eval_samples below {held_out}, or give more records"
            )
        if not skipped:
            raise UserError(f"no prompts left to train on in {', '.join(paths)}: the file is empty, check data.path")
        raise UserError(
            f"no prompts left to train on in {', '.join(paths)} ({held_out} held out; left out: {reasons}): "
            "check data.path, data.format and data.max_length"
        )
    return (
        PromptDataset(arrays=arrays.part(held_out, len(arrays.samples)), max_length=max_length, skipped=skipped),
        PromptDataset(arrays=arrays.part(0, held_out), max_length=max_length),
    )


def read_sources(path: str | Sequence[str], weights: Sequence[float] | None = None, **source: Any) -> Iterator[Record]:
    """The records of one or several paths: one path after the other, or in proportion to `weights` until one has no more.

    Raises UserError unless there is a weight above 0 for each path; see also `read_records`, which gets `source`.
    """
    paths = [path] if isinstance(path, str) else list(path)
    sources = [read_records(name, **source) for name in paths]
    if weights is None:
        yield from chain.from_iterable(sources)
        return
    if len(weights) != len(sources) or not all(weight > 0 for weight in weights):
        raise UserError(f"data.weights={list(weights)}: give a number above 0 for each of the {len(sources)} paths")
    taken = [0] * len(sources)
    while True:
        index = min(range(len(sources)), key=lambda number: (taken[number] + 1) / weights[number])
        record = next(sources[index], None)
        if record is None:
            counts = ", ".join(f"{count} from {path}" for path, count in zip(paths, taken, strict=True))
            log.info("%s has no more records, so no more are read: %s", paths[index], counts)
            return
        taken[index] += 1
        yield record


def _write(
    writer: PromptWriter, outcomes: Iterator[Outcome], max_length: int, wanted: int | None, num_eval: int, max_broken: int
) -> dict[str, Any]:
    """Write the usable samples, until there are `wanted`. Returns how many are held out, and what was left out."""
    skipped: Counter[str] = Counter()
    num_written = num_held_out = num_broken = 0
    reported = time.monotonic()
    for outcome in outcomes:
        skipped += outcome.reasons
        if outcome.error is not None:
            num_broken += 1
            if num_broken > max_broken:
                hint = f" ({num_broken} broken records, data.max_broken={max_broken})" if max_broken else ""
                raise UserError(f"{outcome.error}{hint}")
            log.warning("left out a broken record: %s", outcome.error)
            skipped["broken"] += 1
        is_held_out = num_written < num_eval
        for sample in outcome.samples:
            mask = sample.loss_mask
            if not mask.any():
                skipped["nothing supervised"] += 1
            elif not mask[MIN_LABEL_POSITION:max_length].any():
                skipped["nothing supervised within max_length"] += 1
            elif is_held_out and num_held_out == num_eval:
                skipped["a turn of a held-out conversation"] += 1
            elif num_written != wanted:
                turn = NO_TURN if sample.turn is None else sample.turn
                writer.add(sample.input_ids[:max_length], mask[:max_length], outcome.number, turn)
                num_written += 1
                num_held_out += is_held_out
        if num_written == wanted:
            break
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            log.info("tokenised %d records: %d samples, %d tokens", outcome.number, num_written, writer.num_tokens)
    return {"num_held_out": num_held_out, "skipped": dict(skipped.most_common())}


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts], default=str).encode()).hexdigest()[:24]


def _source_key(path: str, split: str) -> list[Any]:
    """Names, sizes and times of the files, also of a data set's that was saved to a folder, or the name of a data set."""
    files = find_files(path, split)
    if files is None and Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    if files is None:
        return [path]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _template_key(template: ChatTemplate) -> list[Any]:
    tokenizer = template.tokenizer
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    key: list[Any] = [vocabulary, tokenizer.special_tokens_map, template.end_ids]
    if template.exists:
        key += [template.text, tokenizer.chat_template, template.arguments]
        key.append(template.today if template.writes_date else None)
    return key

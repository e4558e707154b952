"""Features on disk: what `capture` writes and `topology=offline` reads, any number of times."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_dataflow.contracts import SCHEMA_VERSION, SampleRef, UserError, assert_no_tensors, ref_from_json, ref_to_json
from lightning_dataflow.contracts.foreign import parse_json, read_bounded
from lightning_dataflow.contracts.old_refs import ref_from_old_json
from lightning_dataflow.contracts.records import OLD_SCHEMA_VERSION
from lightning_dataflow.contracts.validation import check_schema
from lightning_dataflow.control import resolve_control_plane
from lightning_dataflow.control.log import MAX_LINE_BYTES
from lightning_dataflow.data.source import FeatureCard, IndexedSource, RefWindow
from lightning_dataflow.stores import SharedDirFeatureStore
from lightning_dataflow.stores.finite import skip_reason

MANIFEST, REFS, COUNTS = "manifest.json", "refs.jsonl", "token_counts.safetensors"


class OfflineSource(IndexedSource):
    """Refs of a folder of captured features.

    Attributes:
        refs: of all samples, in the order of the prompts.
        broken: where features held NaN or infinity when they were captured, by index of the sample, as text. There is no
            file of those; they are skipped.

    Args:
        folder: written by `lightning-dataflow capture`.
        secret: of the store, if it was made with one.

    Raises:
        UserError: no finished capture there, or one of another schema.
    """

    def __init__(self, folder: str | Path, *, secret: str | None = None):
        self.folder = Path(folder)
        self.plane = resolve_control_plane("local_colocated", str(folder))
        if not is_captured(folder):
            raise UserError(
                f"no finished capture in {folder} ({MANIFEST} is missing): run "
                f"`lightning-dataflow capture store.root={folder}`"
            )
        try:
            manifest = parse_json(read_bounded(self.folder / MANIFEST), MANIFEST)
            if (version := manifest["schema_version"]) != OLD_SCHEMA_VERSION:
                check_schema(version, str(folder), "capture again")
            self.card = _read_card(manifest["card"], self.folder)
            self.refs = _read_refs(self.folder / REFS, version)
            num_samples, self.broken = manifest["num_samples"], {**manifest.get("broken", {})}
        except (KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            raise UserError(f"the capture in {self.folder} is damaged ({error!r}): capture again") from error
        self.store = SharedDirFeatureStore(self.folder, retain=True, secret=secret)
        if len(self.refs) != num_samples:
            raise UserError(
                f"{self.folder}/{REFS} lists {len(self.refs)} samples, {MANIFEST} says {num_samples}: "
                "the capture is damaged, run it again"
            )
        self.source_ids = [ref.origin.source_id for ref in self.refs]
        self.lengths = [ref.num_tokens for ref in self.refs]

    @property
    def num_bytes(self) -> int:
        """Payload of all samples."""
        return sum(ref.num_bytes for ref in self.refs)

    def window(self, seqs: range, share: Sequence[int]) -> RefWindow:
        """The same ref in every pass."""
        indices = {seq: self.order.locate(seq)[0] for seq in seqs}
        broken = {
            seq: skip_reason(self.broken[str(index)], self.source_ids[index])
            for seq, index in indices.items()
            if str(index) in self.broken
        }
        return self.make_window(seqs, {seq: self.refs[indices[seq]] for seq in share}, broken)

    def discard(self, refs: Sequence[SampleRef]) -> None:
        """Keep the files for the next pass."""

    def token_counts(self, vocab_size: int) -> Tensor:
        try:
            counts = load_file(self.folder / COUNTS)["token_counts"]
        except (FileNotFoundError, SafetensorError, KeyError) as error:
            raise UserError(f"the capture in {self.folder} is damaged ({error}): capture again") from error
        if len(counts) != vocab_size:
            raise UserError(
                f"{self.folder} was captured for a vocabulary of {len(counts)} tokens, the target has {vocab_size}: "
                "capture again with this target"
            )
        return counts


def is_captured(folder: str | Path) -> bool:
    """Whether `folder` holds a finished capture."""
    return (Path(folder) / MANIFEST).is_file()


def write_manifest(
    folder: Path,
    refs: Sequence[SampleRef],
    card: FeatureCard,
    token_counts: Tensor,
    broken: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """Describe a finished capture. `manifest.json` is written last: where it is, everything else is too.

    Args:
        broken: see OfflineSource, by index.
    """
    assert_no_tensors(refs)
    (folder / REFS).write_text("".join(json.dumps(ref_to_json(ref)) + "\n" for ref in refs))
    save_file({"token_counts": token_counts}, folder / COUNTS)
    manifest = {"schema_version": SCHEMA_VERSION, "num_samples": len(refs), "card": asdict(card), "broken": dict(broken)}
    part = folder / f".{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=1))
    part.replace(folder / MANIFEST)


def _read_card(data: Any, folder: Path) -> FeatureCard:
    try:
        return FeatureCard.from_json(data)
    except UserError as error:
        raise UserError(f"the capture in {folder} is damaged ({error}): capture again") from error


def _read_refs(path: Path, version: int) -> list[SampleRef]:
    refs, from_json = [], ref_from_old_json if version == OLD_SCHEMA_VERSION else ref_from_json
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            try:
                refs.append(from_json(parse_json(line.removesuffix(b"\n"), REFS, MAX_LINE_BYTES)))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from error
    return refs

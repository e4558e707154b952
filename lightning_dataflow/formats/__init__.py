"""Folders of drafts as serving engines read them: configuration, weight names, layer ids. Written and read."""

from lightning_dataflow.formats.base import DraftFormat, DraftSpec
from lightning_dataflow.formats.folder import write_draft
from lightning_dataflow.formats.reading import PublishedDraft, is_published, read_draft
from lightning_dataflow.formats.registry import resolve_format

__all__ = [
    "DraftFormat",
    "DraftSpec",
    "PublishedDraft",
    "is_published",
    "read_draft",
    "resolve_format",
    "write_draft",
]

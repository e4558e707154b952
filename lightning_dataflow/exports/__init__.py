"""Trained drafts as folders for serving engines, with a model card."""

from lightning_dataflow.exports.export import export_draft

__all__ = ["export_draft"]

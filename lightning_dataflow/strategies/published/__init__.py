"""Folders of drafts for serving engines: what stands in them, and reading them back."""

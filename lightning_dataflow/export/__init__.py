"""Folders of drafts as serving engines read them: configuration, weight names, layer ids. Written and read."""

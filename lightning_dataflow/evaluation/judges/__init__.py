"""Serving engines that measure a draft's acceptance."""

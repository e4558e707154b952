"""Domino (arXiv 2605.29707)."""

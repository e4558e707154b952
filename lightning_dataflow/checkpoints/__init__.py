"""Checkpoints: which are complete, how they are written and read, and a Trainer that handles both."""

"""Draft-training strategies: one LightningModule each, found by name."""

"""The control plane in a Redis, which any number of machines reach."""

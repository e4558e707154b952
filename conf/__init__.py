"""Hydra configuration tree, installed as `lightning_dataflow.conf`."""

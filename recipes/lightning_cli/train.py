"""The same with LightningCLI: train.py fit --config recipes/lightning_cli/config.yaml."""

from lightning.pytorch.cli import LightningCLI

from lightning_dataflow import DataFlowDataModule, Eagle3Module

if __name__ == "__main__":
    LightningCLI(Eagle3Module, DataFlowDataModule, seed_everything_default=0)

"""Train a draft model: `python train.py strategy=eagle3 topology=online`. See README.md."""

from lightning_dataflow.cli.train import main

if __name__ == "__main__":
    main()

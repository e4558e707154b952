"""`python -m lightning_dataflow`."""

from lightning_dataflow.cli.main import main

if __name__ == "__main__":
    main()

"""`python -m lightning_dataflow`."""

from lightning_dataflow.app.commands import main

if __name__ == "__main__":
    main()

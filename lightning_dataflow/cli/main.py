"""`lightning-dataflow COMMAND OVERRIDES…`, also `python -m lightning_dataflow`."""

import importlib
import sys

from lightning_dataflow.contracts.errors import INTERRUPTED

COMMANDS = {
    "train": "train a draft",
    "capture": "write the target's features to disk, for topology=offline",
    "evaluate": "measure acceptance and speed-up of a checkpoint, a run or an exported draft",
    "export": "write a checkpoint as a folder that SGLang or vLLM serves",
    "conformance": "compare what target.engine captures with what transformers does",
    "status": "show a disaggregated run from outside: lightning-dataflow status runs/NAME",
    "clean": "remove from a Redis what an abandoned run left there",
    "show-mask": "print samples with their supervised tokens coloured",
}


def main() -> None:
    """Run a command. Without one, overrides go to `train`: Lightning starts further ranks that way."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if "=" in name or (name.startswith("-") and name not in ("-h", "--help")):
        name = "train"
    elif name in COMMANDS:
        del sys.argv[1]
    else:
        print("usage: lightning-dataflow COMMAND [OVERRIDES]\n")
        print("\n".join(f"  {command:12}{text}" for command, text in COMMANDS.items()))
        print("\nCOMMAND --help shows the configuration.")
        sys.exit(0 if name in ("-h", "--help") else 1)
    try:
        importlib.import_module(f"lightning_dataflow.cli.{name.replace('-', '_')}").main()
    except KeyboardInterrupt:  # during the import; commands handle their own
        sys.exit(INTERRUPTED)

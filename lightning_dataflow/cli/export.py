"""The `export` command: a folder for SGLang or vLLM from a checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_dataflow.contracts import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder and print where the serve command is."""
    parser = argparse.ArgumentParser(prog="lightning-dataflow export", description=__doc__)
    parser.add_argument(
        "source", type=Path, help="checkpoint (file or folder), runs/NAME, or the folder of a published draft"
    )
    parser.add_argument("--engine", required=True, choices=("sglang", "vllm"), help="who will serve it")
    parser.add_argument("--format", default="plain", choices=("plain", "speculators"), help="speculators: for vLLM only")
    parser.add_argument(
        "--out", dest="folder", metavar="OUT", required=True, type=Path, help="folder to write, which must not exist"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of the weights")
    parser.add_argument("--target", help="folder of the target; by default where it was when the draft was trained")
    parser.add_argument("--tokenizer", action="store_true", help="copy the target's tokenizer files along")
    options = parser.parse_args(arguments)
    from lightning_dataflow.export.export import export_draft  # here, so that --help does not load torch
    from lightning_dataflow.export.folder import CARD

    try:
        folder = export_draft(**vars(options))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{folder} is written; {folder / CARD} says how to serve it")

"""The `capture` command: features of all training prompts, to disk."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from lightning_dataflow.cli.hydra_command import command
from lightning_dataflow.config.files import read_secret
from lightning_dataflow.config.parsing import quoted
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import printable

if TYPE_CHECKING:
    from lightning_dataflow.data import OfflineSource


def capture(config: TrainConfig) -> None:
    """Write features to `store.root`, for `topology=offline`."""
    from lightning_dataflow.data import OfflineSource
    from lightning_dataflow.data.offline import is_captured
    from lightning_dataflow.run.builder import Builder

    if config.store.root is None:
        raise UserError("capture writes to store.root, which is not set: add store.root=features/NAME")
    folder = Path(config.store.root)
    if is_captured(folder):
        raise UserError(f"{folder} already holds a finished capture: choose another store.root, or remove the folder")
    Builder(config).capture_once(folder)
    source = OfflineSource(folder, secret=read_secret(config.store))
    skipped = ", ".join(f"{count} {reason}" for reason, count in source.card.skipped.items()) or "none"
    print(printable(f"{len(source)} samples in {folder}, {source.num_bytes / 1e9:.2f} GB; records left out: {skipped}"))
    if source.broken:
        print(f"{len(source.broken)} of them hold NaN or infinity and will be skipped: sample {_broken(source)}")
    others = [each for each in HydraConfig.get().overrides.task if not each.startswith(("store", "topology"))]
    root = str(folder) if str(folder).replace("/", "").isalnum() else quoted(folder)
    print("train on them:", shlex.join(["python", "train.py", "topology=offline", f"store.root={root}", *others]))


def _broken(source: "OfflineSource") -> str:
    """The first few broken samples, by name."""
    first = list(source.broken.items())[:3]
    return ", ".join(f"{source.source_ids[int(index)]} ({where})" for index, where in first)


main = command(capture)

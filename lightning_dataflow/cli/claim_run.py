"""The folder of a run belongs to one command."""

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.errors import BAD_SETTINGS
from lightning_dataflow.run.claim import claim
from lightning_dataflow.run.ranks import rank_from_environment


class ClaimRun(Callback):
    """Claims the run's folder before Hydra writes its settings there.

    Rank 0 claims for all ranks. Producers have folders of their own, and any number of them may join a run.

    Attributes:
        wanted: whether the command of this process owns the folder of its run.
    """

    wanted = False

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exits with one line where another process owns the folder: Hydra drops exceptions of its hooks."""
        if not self.wanted or config.role == "producer":
            return
        if rank_from_environment() > 0:
            with read_write(config.hydra):
                config.hydra.output_subdir = None  # else it would write the settings before rank 0 has the claim
            return
        with read_write(config.hydra):  # Hydra does the same later; `run_dir` refers to it
            config.hydra.runtime.output_dir = str(Path(config.hydra.run.dir).absolute())
        HydraConfig.instance().set_config(config)
        try:
            for folder in dict.fromkeys((config.hydra.run.dir, config.run_dir)):
                claim(
                    Path(folder),
                    "choose another run_name; or end that process, or wait for it, and resume with ckpt_path=last",
                )
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(BAD_SETTINGS)

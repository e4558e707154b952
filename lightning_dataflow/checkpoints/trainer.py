"""A Lightning Trainer that marks complete checkpoints, and resumes only from checkpoints that fit."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dataflow.checkpoints.files import CheckpointFiles
from lightning_dataflow.checkpoints.markers import make_room, mark_complete
from lightning_dataflow.checkpoints.paths import local_path
from lightning_dataflow.checkpoints.reading import read_header
from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.folders import KeptFolder
from lightning_dataflow.data import DataFlowDataModule


class DataFlowTrainer(L.Trainer):
    """`lightning.Trainer`, with one more argument, and checkpoints that survive a kill at any moment.

    Every save, by a ModelCheckpoint or by you, full or sharded, ends with a completion marker, written once all ranks are
    done. `latest_checkpoint(folder)` finds the newest checkpoint that has one. Only then does the source learn that its
    samples are durable. Resuming from a checkpoint of another training is refused before anything is loaded. Nothing is
    unpickled, and nothing is removed but checkpoints directly in the folders to which this Trainer saves them.

    Files on remote file systems (`s3://…`) are saved as Lightning saves them, without markers.

    Args:
        max_bad_steps: end the fit after this many steps in a row with a NaN or infinite loss or gradient norm; None for
            never.

    Raises:
        UserError: there is another CheckpointIO among the plugins; it could return before the checkpoint is written.
    """

    def __init__(self, *, plugins: Any = None, max_bad_steps: int | None = 3, **kwargs: Any):
        if max_bad_steps is not None and (not isinstance(max_bad_steps, int) or max_bad_steps < 1):
            raise UserError(
                f"max_bad_steps={max_bad_steps} is no number of steps: give 1 to end at the first bad one, null for never"
            )
        self.max_bad_steps = max_bad_steps
        given = [] if plugins is None else list(plugins) if isinstance(plugins, Sequence) else [plugins]
        if any(isinstance(plugin, CheckpointIO) for plugin in given):
            raise UserError("Trainer(plugins=…): a DataFlowTrainer writes checkpoints itself, leave CheckpointIO out")
        self._checkpoint_files = CheckpointFiles()
        self._root: KeptFolder | None = None
        super().__init__(plugins=[*given, self._checkpoint_files], **kwargs)

    def fit(
        self,
        model: L.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = True,
    ) -> None:
        """Raises UserError for a checkpoint that is damaged or does not belong to this training."""
        data = train_dataloaders if isinstance(train_dataloaders, L.LightningDataModule) else datamodule
        if ckpt_path is not None and ckpt_path not in ("best", "last", "hpc", "registry"):
            check, local = getattr(model, "check_checkpoint", None), local_path(ckpt_path)
            if check is not None and local is not None:
                check(read_header(local), data)
        self._root = KeptFolder(self.default_root_dir)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Weights alone are no checkpoint to resume from, so they get no marker.

        Raises UserError where the folder of this fit was moved or removed: it is not made again.

        Raises NotFiniteError, before anything is written or voided, if a weight, or the loss through the weights, is not
        finite, or if such an error has ended the fit. While such an error is ending the fit, this does nothing, whichever
        callback calls it. Nothing is saved either while all steps of the run were bad.
        """
        if self.training and getattr(self.lightning_module, "failure", None) is not None:
            return
        check = getattr(self.lightning_module, "check_weights", None)
        if check is not None:
            check()
        data = getattr(self, "datamodule", None)
        if isinstance(data, DataFlowDataModule) and 0 < self.global_step <= data.num_bad_steps:
            rank_zero_warn(f"{filepath} is not written: no step has changed the draft, their numbers were not finite")
            return
        local = local_path(filepath)
        if self._root is not None and local is not None and local.absolute().is_relative_to(self._root.path):
            self._root.check()
        self._checkpoint_files.admit(os.path.dirname(filepath if local is None else local))
        if local is not None and self.is_global_zero:
            make_room(local)
        self.strategy.barrier("what had this name is void")
        try:
            super().save_checkpoint(filepath if local is None else local, weights_only, storage_options)
            if local is not None and self.is_global_zero and not weights_only:
                mark_complete(local, self.global_step)
            self.strategy.barrier("the checkpoint is complete")
        except BaseException:
            if isinstance(data, DataFlowDataModule):
                data.forget_saved()
            raise
        if isinstance(data, DataFlowDataModule):
            data.mark_saved(self.global_step)

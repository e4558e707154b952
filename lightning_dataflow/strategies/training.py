"""Training by sums: the gradient of one quotient over all micro-batches and ranks of an optimizer step."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dataflow.callbacks import default_callbacks
from lightning_dataflow.callbacks.averaging import end_averages
from lightning_dataflow.contracts import NotFiniteError, StepContext
from lightning_dataflow.data.collate import Batch
from lightning_dataflow.strategies.common.sums import ObjectiveSums
from lightning_dataflow.strategies.finite import NumberCheck
from lightning_dataflow.strategies.optimisation import adamw, scale_gradients, warmup_cosine
from lightning_dataflow.strategies.sharding import fsdp1_root
from lightning_dataflow.strategies.streaming import check_averaging, check_trainer
from lightning_dataflow.strategies.window import WindowSums


class SumsModule(L.LightningModule):
    """Trains `draft` on an objective that returns sums.

    The gradient is that of Σ numerators / Σ denominators over all micro-batches and ranks of an optimizer step, however the
    samples are cut into batches. The denominator D is unknown at the first backward pass. So `training_step` returns
    numerator · W · A / P (W ranks and A micro-batches, by which Lightning divides, and P the window's tokens), and
    `on_before_optimizer_step`, which runs before clipping, multiplies the gradients by P / D.

    A step whose loss or gradient norm is not finite changes nothing, on every rank; its samples count as skipped. The
    Trainer's `max_bad_steps` of them in a row, and weights that are not finite, or give no finite loss, when they are to be
    saved, raise NotFiniteError. Under `16-mixed` precision the gradient is left to the GradScaler, which skips the steps
    that overflow: that is how it finds its scale.

    Attributes:
        step_losses: the loss of every optimizer step so far.
    """

    draft: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.step_losses: list[Tensor | float] = []
        self._window = WindowSums()
        self._window_tokens = 0
        self._numbers = NumberCheck()
        self._trained: dict[str, Tensor] | None = None  # at the end of training, if an average has replaced them

    @abstractmethod
    def objective(self, batch: Batch, context: StepContext) -> ObjectiveSums:
        """Sums of one micro-batch."""

    def derived_metrics(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Further metrics, computed from the step's means."""
        return {}

    def judge_means(self, means: Mapping[str, Tensor]) -> None:
        """Called with the means of each step, which are the same on every rank; may end the fit by an error."""

    @property
    def failure(self) -> NotFiniteError | None:
        """The error that ended the last fit, if a number was not finite. Nothing is saved until another fit starts."""
        return self._numbers.failure

    def check_weights(self) -> None:
        """Raise NotFiniteError on every rank if such an error has ended the fit, or if a weight of the draft, or the loss
        through its weights, is NaN or infinity. A collective."""
        self._numbers.check_weights(self.draft, self.trainer)

    def count_last_step(self) -> None:
        """Tell the DataModule now, and not with the next step, whether the last one was bad. A collective."""
        self._numbers.read(self.trainer)

    def configure_callbacks(self) -> list[L.Callback]:
        """The callbacks that a run needs, except those whose class the user passed."""
        if self.trainer.state.fn == "fit":
            check_averaging(self.trainer)
        return default_callbacks(self.trainer)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, with warm-up and cosine decay over the trainer's max_steps."""
        hparams = self.hparams
        optimizer = adamw(
            self.named_parameters(), lr=hparams["lr"], betas=tuple(hparams["betas"]), weight_decay=hparams["weight_decay"]
        )
        schedule = warmup_cosine(
            optimizer,
            warmup_ratio=hparams["warmup_ratio"],
            min_lr_ratio=hparams["min_lr_ratio"],
            total_steps=self.trainer.max_steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self._numbers = NumberCheck()
        check_trainer(self.trainer)

    def on_train_start(self) -> None:
        """Forget what an earlier, interrupted fit left behind."""
        self._window = WindowSums()
        self._trained = None
        self.step_losses = self.step_losses[: self.trainer.global_step]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        trainer = self.trainer
        sums = self._sums(batch)
        self._window.add(sums)
        self._window_tokens = batch["window_num_tokens"]
        self._numbers.add(batch, self._data().next_seq, sums.loss.denominator)
        return sums.loss.numerator * (trainer.world_size * trainer.accumulate_grad_batches / self._window_tokens)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The numerator of a micro-batch's loss, as the draft stands; to try weights before they are saved."""
        return self._sums(batch).loss.numerator

    def _sums(self, batch: Batch) -> ObjectiveSums:
        trainer = self.trainer
        total_steps = trainer.max_steps if trainer.max_steps > 0 else None
        return self.objective(batch, StepContext(global_step=trainer.global_step, total_steps=total_steps))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Reduce the window's sums once, scale the gradients, log the means."""
        means, denominator, norm = self._window.reduce(
            self.trainer.strategy.reduce, self._numbers.norm(self.parameters(), self.trainer)
        )
        factor = torch.where(denominator > 0, self._window_tokens / denominator.clamp(min=1e-12), 0)
        scale_gradients(self.parameters(), factor)
        self._numbers.judge(means["loss"], norm * factor, optimizer, self.trainer)
        self.judge_means(means)
        self.step_losses.append(means["loss"])
        self._log_means(means)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Under FSDP1, clip by norm through its root, which Lightning itself refuses to do."""
        root = fsdp1_root(self.trainer.strategy.model)
        if root is not None and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            root.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_epoch_end(self) -> None:
        """Check the weights: no loss is computed after the last step, and an average replaces the draft next."""
        self.check_weights()
        self._trained = end_averages(self.trainer, self)

    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _log_means(self, means: Mapping[str, Tensor]) -> None:
        metrics = {f"train/{name}": value for name, value in self.derived_metrics(means).items()}
        for name, value in means.items():
            if value.ndim:
                metrics |= {f"train/{name}_{index}": element for index, element in enumerate(value)}
            elif name != "loss":
                metrics[f"train/{name}"] = value
        self.log("train/loss", means["loss"], prog_bar=True, batch_size=1)
        self.log_dict(metrics, batch_size=1)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)

"""Measures acceptance length by real speculative decoding while training goes on."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dataflow.callbacks.averaging import averaged_weights
from lightning_dataflow.callbacks.steps import StepCallback
from lightning_dataflow.contracts import UserError
from lightning_dataflow.evaluation.acceptance import AcceptanceReport, Decoding, evaluate_acceptance
from lightning_dataflow.targets.hf import HFTargetEngine

log = logging.getLogger(__name__)

LOGGED = ("acceptance_length", "tokens_per_target_forward")


@dataclass(eq=False)
class AcceptanceEvaluation(StepCallback):
    """Decodes held-out prompts before the first step, every `every_n_steps` steps, and after the last.

    Logs `val/acceptance_length`, `val/tokens_per_target_forward` and `val/accepted_i`, the share of proposals accepted at
    least up to position i, to every logger, at the number of optimizer steps done (0 for the first). Ranks share the
    prompts. Every rank decodes with an unsharded copy of the draft.

    A ModelCheckpoint can monitor what was logged after a step that it saves. It also considers the last step, whether or
    not its own interval includes it. A measurement is this package's validation: an EarlyStopping with
    `check_on_train_epoch_end=False` checks after each measurement but the first, which is before training.

    Args:
        target: makes the target; called once, when it is first needed.
        prompts: token ids of each prompt.
        num_draft_tokens: K.
        every_n_steps: 0 for before and after only.
        temperature: 0 for greedy decoding.
        seed: of what is drawn above temperature 0.
    """

    target: Callable[[], HFTargetEngine]
    prompts: Sequence[Sequence[int]]
    _: KW_ONLY
    num_draft_tokens: int = 4
    max_new_tokens: int = 32
    every_n_steps: int = 0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("no held-out prompts to evaluate on: set data.num_eval_samples, or callbacks=no_evaluation")
        self.history: list[dict[str, Any]] = []
        self._target: HFTargetEngine | None = None
        self._measured: dict[str, float] = {}  # after the latest step, if that was measured

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._evaluate(trainer, pl_module)

    def on_step(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        step, self._measured = trainer.global_step, {}
        if step == trainer.max_steps or (self.every_n_steps and step % self.every_n_steps == 0):
            self._measured = self._evaluate(trainer, pl_module)
            pl_module.log_dict(self._measured, batch_size=1, logger=False)  # for callbacks; loggers have it
            for callback in trainer.early_stopping_callbacks:
                callback.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let best checkpoints consider the last measurement. All other callbacks have seen the step."""
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.monitor not in self._measured:
                continue
            if not callback._should_skip_saving_checkpoint(trainer):  # no public method saves what is among the best
                candidates = callback._monitor_candidates(trainer)
                callback._save_topk_checkpoint(trainer, candidates)
                callback._save_last_checkpoint(trainer, candidates)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    def _evaluate(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        if self.history and self.history[-1]["step"] == trainer.global_step:  # resumed at a measured step
            self.history.pop()
        pl_module.check_weights()
        if self._target is None:
            self._target = self.target()
            self._target.set_capture_layers(pl_module.layer_ids)
        with averaged_weights(trainer, pl_module):
            drafter = pl_module.drafter(num_draft_tokens=self.num_draft_tokens)
        mine = evaluate_acceptance(
            self._target,
            drafter,
            self.prompts[trainer.global_rank :: trainer.world_size],
            Decoding(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed),
        )
        report = _over_ranks(mine, trainer)
        settings = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        self.history.append({"step": trainer.global_step, **settings, **report.to_json()})
        metrics = {f"val/{name}": getattr(report, name) for name in LOGGED}
        metrics |= {f"val/accepted_{i}": share for i, share in enumerate(report.acceptance_per_position)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
            logger.save()
        if trainer.is_global_zero:
            shares = ", ".join(f"{share:.3f}" for share in report.acceptance_per_position)
            log.info(
                f"step {trainer.global_step}: acceptance length {report.acceptance_length:.3f} "
                f"on {report.num_prompts} held-out prompts, accepted per position {shares}"
            )
        return metrics


def _over_ranks(mine: AcceptanceReport, trainer: L.Trainer) -> AcceptanceReport:
    counts = [mine.num_prompts, mine.num_tokens, mine.num_drafts, *mine.accepted_per_position]
    device = trainer.strategy.root_device
    total = trainer.strategy.reduce(torch.tensor(counts, dtype=torch.int64, device=device), reduce_op="sum")
    prompts, tokens, drafts, *accepted = total.tolist()
    return replace(mine, num_prompts=prompts, num_tokens=tokens, num_drafts=drafts, accepted_per_position=tuple(accepted))

"""Where a run stands, as an objective sees it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Progress in optimizer steps; all micro-batches of one accumulation window see the same value."""

    global_step: int
    total_steps: int | None = None
    """The trainer's max_steps; None when the run has no such limit."""

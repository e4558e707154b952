"""How much of the target's distribution a cut draft vocabulary covers."""

import logging

import torch
from torch import Tensor

from lightning_dataflow.contracts import UserError

log = logging.getLogger(__name__)

NUM_WINDOWS = 8
LOW_COVERAGE = 0.7
REMEDY = "raise strategy.draft_vocab_size, or train on prompts like those that will be served"


class CoverageCheck:
    """Judges the coverage of the first NUM_WINDOWS windows of a fit. The host waits for the device once, for their mean.

    Coverage is the share of supervised positions whose most probable token, as the target says, is in the draft vocabulary.
    Only those positions teach the draft anything.
    """

    def __init__(self) -> None:
        self._coverages: list[Tensor] = []
        self._is_done = False

    def add(self, coverage: Tensor) -> None:
        """Add a window's coverage, a scalar that is the same on every rank. Raises UserError; see `finish`."""
        if len(self._coverages) < NUM_WINDOWS:
            self._coverages.append(coverage)
        if len(self._coverages) == NUM_WINDOWS:
            self.finish()

    def finish(self) -> None:
        """Log the mean coverage, unless that is done.

        Raises UserError if it is 0: the draft has learnt nothing.
        """
        if self._is_done or not self._coverages:
            return
        self._is_done = True
        coverage, num_windows = float(torch.stack(self._coverages).mean()), len(self._coverages)
        if coverage == 0:
            raise UserError(
                f"no token that the target predicts in the first {num_windows} steps is in the draft vocabulary, so the "
                f"draft learns nothing: {REMEDY}"
            )
        is_low = coverage < LOW_COVERAGE
        log.log(
            logging.WARNING if is_low else logging.INFO,
            "the draft vocabulary has %.1f %% of the tokens that the target predicts, in the first %d steps%s",
            *(100 * coverage, num_windows, f": {REMEDY}" if is_low else ""),
        )

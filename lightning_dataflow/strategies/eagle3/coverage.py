"""How much of the target's distribution a cut draft vocabulary covers."""

import logging
import math

import torch
from torch import Tensor

from lightning_dataflow.contracts import UserError

log = logging.getLogger(__name__)

NUM_WINDOWS = 8
HIGH_SHARE = 0.3
REMEDY = "raise strategy.draft_vocab_size, or train on prompts like those that will be served"


class CoverageCheck:
    """Judges the coverage of the first NUM_WINDOWS windows of a fit. The host waits for the device once, for their mean.

    Positions whose most probable token, as the target says, is outside the draft vocabulary teach the draft nothing.
    """

    def __init__(self) -> None:
        self._shares: list[Tensor] = []
        self._is_done = False

    def add(self, share: Tensor) -> None:
        """Add the share of a window's positions that are outside, a scalar that is the same on every rank.

        It is 0 for a window without positions, and NaN for one that does not count. Raises UserError; see `finish`.
        """
        if not self._is_done:
            self._shares.append(share)
            if len(self._shares) == NUM_WINDOWS:
                self.finish()

    def finish(self) -> None:
        """Log what the vocabulary covers, unless that is done.

        Raises UserError if all positions are outside: the draft has learnt nothing.
        """
        if self._is_done or not self._shares:
            return
        self._is_done = True
        share, num_windows = float(torch.stack(self._shares).nanmean()), len(self._shares)
        if math.isnan(share):
            return
        if share == 1:
            raise UserError(
                f"no token that the target predicts in the first {num_windows} steps is in the draft vocabulary, so the "
                f"draft learns nothing: {REMEDY}"
            )
        is_low = share > HIGH_SHARE
        log.log(
            logging.WARNING if is_low else logging.INFO,
            "the draft vocabulary has %.1f %% of the tokens that the target predicts, in the first %d steps%s",
            *(100 * (1 - share), num_windows, f": {REMEDY}" if is_low else ""),
        )

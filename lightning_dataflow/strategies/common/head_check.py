"""Whether the head and the last hidden state, as drafts are trained on them, give the target's own logits."""

import logging

import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.targets.hf import HFTargetEngine

log = logging.getLogger(__name__)

PROBE_TOKENS = 16


@torch.no_grad()
def check_head(engine: HFTargetEngine) -> None:
    """Compare them on a prompt of tokens from all over the vocabulary.

    Raises:
        UserError: the target does something else with its logits, or its head or embedding was not found in its files. The
            message has the measured difference.
    """
    info, model = engine.info, engine.model
    target = FrozenTarget.of(info, model.dtype).to(engine.device)
    ids = [index * info.vocab_size // PROBE_TOKENS for index in range(PROBE_TOKENS)]
    last, theirs = engine.logits_of(ids)
    ours = (last @ target.head.T).float()
    if target.transform is not None:
        target.transform.apply_(ours)
    what = f"{info.path}: {type(model).__name__}"
    if ours.shape != theirs.shape:
        raise UserError(
            f"{what} gives {theirs.shape[-1]} logits a token, its head has {ours.shape[-1]} rows: drafts are trained on "
            "one logit a row, name another target"
        )
    theirs = theirs.float()
    comparable = ours.isfinite() & theirs.isfinite()
    if not comparable.any():
        log.warning("%s: its logits hold NaN or infinity only, so they were not compared with its head", info.path)
        return
    ours, theirs = ours[comparable], theirs[comparable]
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if difference > _tolerance(model.dtype) * max(largest, float(ours.abs().max())):
        ratio = float(theirs @ ours / (ours @ ours))
        raise UserError(
            f"{what} changes its logits in a way that is not known here: on one prompt they differ by up to "
            f"{difference:.3g} from the head times the last hidden state (the largest is {largest:.3g}; on average they "
            f"are {ratio:.3g} times as large), so drafts would be trained on another distribution: name another target"
        )
    rows = torch.tensor(ids, device=engine.device)
    if not torch.equal(target.embedding[rows].nan_to_num(), model.get_input_embeddings().weight[rows].nan_to_num()):
        raise UserError(f"{what} has another token embedding than was found in its files: name another target")


def _tolerance(dtype: torch.dtype) -> float:
    """Of the largest logit: the product's rounding, and TF32 on a GPU."""
    return max(4 * torch.finfo(dtype).eps, 1e-3)

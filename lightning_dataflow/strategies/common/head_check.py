"""Whether the head and the last hidden state, as drafts are trained on them, give the target's own logits."""

import logging

import torch
from torch import Tensor

from lightning_dataflow.contracts import CapacityError, UserError
from lightning_dataflow.strategies.common.target_tensors import FrozenTarget
from lightning_dataflow.targets import HFTargetEngine, SGLangServerTarget, TargetInfo

log = logging.getLogger(__name__)

PROBE_TOKENS = 16


@torch.no_grad()
def check_head(engine: HFTargetEngine) -> None:
    """Compare the target's own logits with those of its head and last hidden state, on one prompt.

    Raises:
        UserError: the target does something else with its logits, or its head or embedding was not found in its files. The
            message has the measured difference.
    """
    info, model, ids = engine.info, engine.model, _probe(engine.info)
    target = FrozenTarget.of(info, model.dtype).to(engine.device)
    last, theirs = engine.logits_of(ids)
    ours = _logits(target, last)
    if ours.shape != theirs.shape:
        raise UserError(
            f"{info.path} returns {theirs.shape[-1]} logits per token, but its head has {ours.shape[-1]} rows: drafts need "
            "one logit per row, choose another target"
        )
    if not _compare(info, "logits", ours, theirs.float(), _rounding(ours, model.dtype)):
        return
    rows = torch.tensor(ids, device=engine.device)
    if not torch.equal(target.embedding[rows].nan_to_num(), model.get_input_embeddings().weight[rows].nan_to_num()):
        raise UserError(f"the token embedding of {info.path} is not the one in its files: choose another target")


@torch.no_grad()
def check_served_head(engine: SGLangServerTarget) -> None:
    """The same check by the log-probabilities that a server returns for a prompt; logs a warning if it returns none."""
    info, ids = engine.info, _probe(engine.info)
    try:
        last, logprobs = engine.logprobs_of(ids)
    except CapacityError:  # a store full of this run's features, which was checked when it began
        return
    if logprobs is None:
        log.warning("%s: a server gives no log-probabilities, so its head was not compared with its logits", info.path)
        return
    logits = _logits(FrozenTarget.of(info, torch.float32), last.float())
    ours = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None]).squeeze(-1)
    _compare(info, "log-probabilities", ours, torch.tensor(logprobs), 2 * _rounding(logits, last.dtype))


def _probe(info: TargetInfo) -> list[int]:
    return [index * info.vocab_size // PROBE_TOKENS for index in range(PROBE_TOKENS)]


def _logits(target: FrozenTarget, last: Tensor) -> Tensor:
    products = (last @ target.head.T).float()
    return products if target.transform is None else target.transform.apply_(products)


def _rounding(logits: Tensor, dtype: torch.dtype) -> float:
    """By how much logits may differ: the rounding of products in `dtype`, and TF32 on a GPU."""
    largest = float(logits.nan_to_num(0, 0, 0).abs().max())
    return largest * max(4 * torch.finfo(dtype).eps, 1e-3) + 1e-5


def _compare(info: TargetInfo, what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Raise UserError where they differ by more than `tolerance`; False if none can be compared."""
    comparable = ours.isfinite() & theirs.isfinite()
    if not comparable.any():
        log.warning("%s: its %s hold NaN or infinity only, so they were not compared with its head", info.path, what)
        return False
    ours, theirs = ours[comparable], theirs[comparable]
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if difference > tolerance:
        ratio = float(theirs @ ours / (ours @ ours))
        raise UserError(
            f"{info.path} changes its logits in a way that is not known here: on one prompt its {what} differ by up to "
            f"{difference:.3g} from those of the head times the last hidden state (the largest is {largest:.3g}; they are "
            f"{ratio:.3g} times as large), so drafts would be trained on another distribution: name another target"
        )
    return True

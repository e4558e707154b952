"""Whether the data of a fit suits a draft: its captured features, and how samples are packed."""

from collections.abc import Sequence

from lightning_dataflow.contracts import CaptureSpec, UserError
from lightning_dataflow.data import DataFlowDataModule, FeatureCard
from lightning_dataflow.targets.info import TargetInfo


def check_features(
    card: FeatureCard, strategy: str, features: Sequence[str], target: TargetInfo, layer_ids: tuple[int, ...]
) -> None:
    """Raise UserError naming the first way in which captured features do not fit a draft of `target` that reads `features`
    of `layer_ids`."""
    expected = CaptureSpec(layer_ids=layer_ids, norm="post", hidden_size=target.hidden_size)
    missing = set(features) - set(card.features)
    if missing:
        raise UserError(f"the features lack {', '.join(sorted(missing))}, which {strategy} needs: capture again")
    for what, actual, wanted in (
        ("hidden size", card.capture.hidden_size, expected.hidden_size),
        ("norm of the last hidden state", card.capture.norm, expected.norm),
        ("tokenizer", card.tokenizer_version, target.tokenizer_version),
        ("target weights", card.target_model_version, target.model_version),
    ):
        if actual != wanted:
            raise UserError(
                f"the features were captured with another {what} ({actual}, this draft's target {target.path} has "
                f"{wanted}): capture again with this target, or train with the one they came from"
            )
    if card.capture.layer_ids != expected.layer_ids:
        layers = list(card.capture.layer_ids)
        raise UserError(
            f"the features hold the target's layers {layers}, this {strategy} draft reads {list(expected.layer_ids)}: "
            f"capture again with strategy={strategy}, or set 'strategy.layer_ids={layers}'"
        )


def check_packing(data: DataFlowDataModule, strategy: str, packs: bool) -> None:
    """Raise UserError when samples are packed for a draft that cannot tell them apart, or do not fit into a row."""
    row_tokens, longest = data.batching.row_tokens, data.source.card.max_num_tokens
    if data.batching.packed and not packs:
        raise UserError(f"{strategy} does not pack samples: leave row_tokens and rows_per_step out")
    if row_tokens is not None and row_tokens < longest:
        raise UserError(
            f"row_tokens={row_tokens} is less than the {longest} tokens of the longest sample: raise it, or cut samples to "
            "a smaller max_length"
        )
